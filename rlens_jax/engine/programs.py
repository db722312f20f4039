"""The compiled programs of a search: one per (program, bucket). The plan is data, so another plan compiles nothing.

Each work group has its own rows; the plan is the same for all.

`layers` runs any consecutive layers under any plan. Base states and candidates go through this one program, so a result from
stored states is bit-equal to a result from the first layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.engine.model_programs import EVERYWHERE, ROWS, ModelPrograms
from rlens_jax.models.decoder import Context, Decoder, TracedPlan
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Tokens, decode, is_any, prefill
from rlens_jax.models.layers import best_token, log_probability
from rlens_jax.models.prompt import IGNORE, PromptBatch
from rlens_jax.plans import STANDARD_LEVELS, Levels, Plan, Reduction
from rlens_jax.sharding.mesh import everywhere
from rlens_jax.sharding.model_axis import WORK


class States(NamedTuple):
    """What enters a layer."""

    x: Float[Array, "B T D"]
    """The states, with the deepstack feature of the layer before."""
    scored: Bool[Array, " B"]
    """Whether all probe scores so far were numbers."""
    features: Float[Array, "B P features"] | None = None
    """The deepstack features of all layers; None without deepstack."""


class Programs(ModelPrograms):
    """The programs of a search over one model, as `ModelPrograms`.

    Args:
        reduction: how reduced layers treat visual tokens.
        seed: draws random probes.
        new_tokens: most tokens that `generate` makes.
        stop_tokens: the tokens that end a turn.
        levels: what the layers of its plans may do; all of this is compiled.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        mesh: Mesh,
        reduction: Reduction,
        *,
        seed: int,
        new_tokens: int,
        stop_tokens: Tokens,
        levels: Levels = STANDARD_LEVELS,
    ):
        super().__init__(model, mesh)
        self.reduction = reduction
        self.seed = seed
        self.new_tokens = new_tokens
        self.stop_tokens = stop_tokens
        self.levels = levels
        self.embed_program = self.program("embed", _embed, (ROWS,) * 2, ROWS)
        self.layers_program = self.program("layers", self._layers, (ROWS, ROWS, *(EVERYWHERE,) * 3), ROWS)
        self.last_layer_program = self.program("last layer", self._last_layer, (ROWS,) * 2, ROWS)
        self.outcome_program = self.program("outcome", self._outcome, (ROWS,) * 2, EVERYWHERE)
        self.generate_program = self.program("generate", self._generate, (ROWS, ROWS, EVERYWHERE), EVERYWHERE)

    def embed(self, text_ids: Int[Array | np.ndarray, "B X"], visual: Float[np.ndarray, "rows P visual_width"]) -> States:
        """The states before the first layer; the visual tokens come from the host."""
        return self.embed_program(text_ids, self.put(visual))

    def layers(self, states: States, batch: PromptBatch, plan: Plan, start: int, stop: int) -> States:
        """The states after layers `start` .. `stop` - 1 under a plan."""
        bounds = (everywhere(np.array(bound, np.int32), self.mesh) for bound in (start, stop))
        x, scored = self.layers_program(states, batch, self.traced(plan), *bounds)
        return States(x, scored, states.features)

    def last_layer(self, states: States, batch: PromptBatch, plan: Plan) -> States:
        """The states after the last layer at the places of the answers; those of all other slots are as they enter it.

        What the last layer does for visual tokens reaches no answer, so it is the same for every plan. A subclass may reduce
        other tokens of the batch.
        """
        return self.last_layer_program(states, batch)

    def outcome(
        self, states: States, batch: PromptBatch
    ) -> tuple[Int[Array, "B Q"], Bool[Array, "B Q"], Float[Array, "B Q"], Bool[Array, "B Q"]]:
        """For each branch, on every device: its sample; whether every answer token is the argmax, where any token that ends a
        turn is right at the end; the mean log-probability of answer and end-of-turn token; whether all numbers are finite.
        """
        return self.outcome_program(states._replace(features=None), batch)

    def generate(
        self, visual: Float[Array, "B P visual_width"], batch: PromptBatch, plan: Plan
    ) -> tuple[Int[Array, "B Q"], Int[Array, "B Q Y"], Bool[Array, "B Q"]]:
        """For each branch, on every device: its sample; the greedy new tokens; whether all scores and logits are finite."""
        return self.generate_program(visual, batch, self.traced(plan))

    def traced(self, plan: Plan) -> TracedPlan:
        """A plan as data on the devices."""
        attention, ffn = (everywhere(places, self.mesh) for places in plan.indices(self.config.num_layers, self.levels))
        return TracedPlan(attention, ffn, self.levels)

    def random_key(self) -> Array:
        """The key that random probes are drawn with."""
        return jax.random.key(self.seed)

    def run_layers(
        self, decoder: Decoder, x: Array, context: Context, batch: PromptBatch, plan: TracedPlan, start: Array, stop: Array
    ) -> tuple[Array, Array]:
        """Inside `layers`: the states after layers `start` .. `stop` - 1. A subclass may reduce other tokens of the batch."""
        return decoder.run_layers(x, context, plan, self.reduction, start, stop)

    def _layers(
        self, model: VisionLanguageModel, states: States, batch: PromptBatch, plan: TracedPlan, start: Array, stop: Array
    ) -> tuple[Array, Array]:
        key, features = self.random_key(), states.features
        context = model.decoder.context(batch.layout, batch.rope_positions, key, self.kernel, features=features)
        x, now = self.run_layers(model.decoder, states.x, context, batch, plan, start, stop)
        return x, states.scored & now

    def _last_layer(self, model: VisionLanguageModel, states: States, batch: PromptBatch) -> States:
        key, features = self.random_key(), states.features
        context = model.decoder.context(batch.layout, batch.rope_positions, key, self.kernel, features=features)
        last = model.decoder.last_layer_at(states.x, context, jnp.asarray(batch.answer_slots))
        return States(last, states.scored)

    def _generate(
        self, model: VisionLanguageModel, visual: Array, batch: PromptBatch, plan: TracedPlan
    ) -> tuple[Array, Array, Array]:
        key = self.random_key()
        first, cache, good = prefill(model.decoder, visual, batch, plan, self.reduction, self.new_tokens, key, self.kernel)
        tokens, finite = decode(model.decoder, first, cache, batch, self.new_tokens, self.stop_tokens)
        return all_rows((batch.samples, tokens, good & finite))

    def _outcome(self, model: VisionLanguageModel, states: States, batch: PromptBatch) -> tuple[Array, ...]:
        x, scored, _ = states
        logits = model.decoder.logits(jnp.take_along_axis(x, batch.answer_slots[:, :, None], axis=1))
        counts, best, stops = batch.answer_targets != IGNORE, best_token(logits), self.stop_tokens
        targets = jnp.where(counts, batch.answer_targets, 0)
        right = (best == targets) | (is_any(best, stops) & is_any(targets, stops)) | ~counts
        branches = jnp.arange(batch.samples.shape[1])[None, None, :]
        mine = counts[:, :, None] & (batch.answer_branch[:, :, None] == branches)  # [B, A, Q]
        total = jnp.where(mine, log_probability(logits, targets)[:, :, None], 0.0).sum(axis=1)
        count = jnp.maximum(1, mine.sum(axis=1)).astype(jnp.float32)
        all_right = (right[:, :, None] | ~mine).all(axis=1)
        return all_rows((batch.samples, all_right, total / count, scored[:, None] & jnp.isfinite(total)))


def _embed(model: VisionLanguageModel, text_ids: Array, visual: Array) -> States:
    decoder = model.decoder
    return States(decoder.embed(text_ids, visual), jnp.ones(text_ids.shape[0], bool), decoder.features(visual))


def all_rows(arrays: Any) -> Any:
    """All groups' rows on every device: outcomes are small, and every process decides by all of them."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, WORK, tiled=True), arrays)
