"""The programs behind each variant of a study: the plain reduction, the text control, and token pruning.

The text control of the paper applies the reductions to the prompt's *text* tokens instead of the visual tokens. A token of prompt
text (template included) sees only the previous R tokens of prompt text, itself included, and passes only through the FFN units
that probes among the prompt text choose. Visual tokens are dense, and so is the answer that teacher forcing appends. R is an
eighth of a sample's prompt text tokens (our decision, after the paper's range of about P / 8 visual tokens). The shares of units
and probes are those of the visual reduction. The control is simulated: the plain references of rlens_jax/ops compute everything,
and masks select the results. Its running time has no meaning, and nobody should deploy it.

Token pruning is a prefill that drops visual tokens between layers (`rlens_jax.models.pruned`). The stored states of a base plan
would hold other tokens, so every plan is computed from its first layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.data.samples import Sample
from rlens_jax.engine.model_programs import EVERYWHERE, ROWS
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.programs import Programs, States
from rlens_jax.engine.scoring import BranchOutcomes, Scoring, TeacherForcing, read_outcome
from rlens_jax.layout import Slots, TokenLayout, visible
from rlens_jax.models.decoder import Context, Decoder, DecoderLayer, TracedPlan, add_feature, layer_at
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Tokens
from rlens_jax.models.prompt import IGNORE, PromptBatch
from rlens_jax.models.pruned import run_prompt
from rlens_jax.ops.attention import masked_attention
from rlens_jax.ops.ffn import dense_ffn, simulated_dynamic_ffn
from rlens_jax.paper_studies.study import Variant
from rlens_jax.plans import FULL, Plan, Reduction
from rlens_jax.pruning import Pruning
from rlens_jax.sharding.model_axis import sum_over_shards

TEXT_RANGE = 8
"""R is the number of prompt text tokens divided by this."""


def make_scoring(model: VisionLanguageModel, mesh: Mesh, variant: Variant, seed: int, stop_tokens: Tokens) -> Scoring:
    """The scoring that evaluates plans under a variant; each variant has its own programs."""
    kind = TextPrograms if variant.tokens == "text" else Programs
    programs = kind(model, mesh, variant.reduction, seed=seed, new_tokens=1, stop_tokens=stop_tokens)
    return TeacherForcing(programs) if variant.pruning is None else PrunedForcing(programs, variant.pruning)


class PrunedForcing:
    """An `rlens_jax.engine.scoring.Scoring` that runs a whole prefill with token pruning per plan.

    Args:
        programs: the programs of the search.
        pruning: how tokens are dropped; static, whereas the plan is data.
    """

    def __init__(self, programs: Programs, pruning: Pruning):
        def prefill(model: VisionLanguageModel, visual: Array, batch: PromptBatch, plan: TracedPlan) -> States:
            key = programs.random_key()
            states = run_prompt(model.decoder, visual, batch, plan, programs.reduction, key, programs.kernel, pruning)
            return States(states.x, states.scored)

        self.programs = programs
        self._prefill = programs.program("pruned", prefill, (ROWS, ROWS, EVERYWHERE), ROWS)

    def hold(self, batches: Sequence[Batch]) -> None:
        pass  # no states are stored

    def start(self, batch: Batch, base: Plan, plan: Plan) -> Any:
        programs = self.programs
        states = self._prefill(programs.put(batch.visual), batch.inputs, programs.traced(plan))
        return programs.outcome(states, batch.inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        return read_outcome(run)

    def state_bytes(self, pool: Pool) -> int:
        return 0

    def release(self) -> None:
        pass


class TextPrograms(Programs):
    """The programs of a search that reduces the prompt's text. The weights must not be cut over devices."""

    def run_layers(
        self, decoder: Decoder, x: Array, context: Context, batch: PromptBatch, plan: TracedPlan, start: Array, stop: Array
    ) -> tuple[Array, Array]:
        return run_text_layers(decoder, x, context, num_prompt_text(batch), plan, self.reduction, start, stop)

    def last_layer(self, states: States, batch: PromptBatch, plan: Plan) -> States:
        return self.layers(states, batch, plan, self.config.num_layers - 1, self.config.num_layers)


def num_prompt_text(batch: PromptBatch) -> Int[Array, " B"]:
    """Text tokens of each prompt without its answer; the answer is at the end of the text slots."""
    return jnp.asarray(batch.layout.num_text) - (jnp.asarray(batch.answer_targets) != IGNORE).sum(axis=1, dtype=jnp.int32)


def run_text_layers(
    decoder: Decoder,
    x: Float[Array, "B T D"],
    context: Context,
    num_prompt: Int[Array, " B"],
    plan: TracedPlan,
    reduction: Reduction,
    start: Int[Array, ""],
    stop: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Bool[Array, " B"]]:
    """`Decoder.run_layers` with exchanged roles: the states, and whether all probe scores were numbers."""
    graph, stack = nnx.split(decoder.layers)

    def body(layer: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, scored = carry
        module = nnx.merge(graph, layer_at(stack, layer))
        x = jax.lax.cond(
            plan.attention[layer] > 0,
            lambda: attend_text(module, x, context, num_prompt),
            lambda: module.attend(x, context, reduction, FULL)[0],
        )
        x, now = jax.lax.cond(
            plan.ffn[layer] > 0,
            lambda: feed_text(module, x, context, reduction, layer, num_prompt),
            lambda: (module.feed(x, context, reduction, FULL, layer)[0], jnp.ones_like(scored)),
        )
        return add_feature(x, context, layer), scored & now

    return jax.lax.fori_loop(start, stop, body, (x, jnp.ones(x.shape[0], bool)))


def attend_text(
    module: DecoderLayer, x: Float[Array, "B T D"], context: Context, num_prompt: Int[Array, " B"]
) -> Float[Array, "B T D"]:
    """A layer's first half with Hollow Attention for prompt text, simulated."""
    q, k, v = module.attention.project(module.input_norm(x), context.rotary)
    attended = masked_attention(q, k, v, text_visible(context.layout, num_prompt))
    return x + sum_over_shards(module.attention.o_proj(attended))


def text_visible(layout: TokenLayout, num_prompt: Int[Array, " B"]) -> Bool[Array, "B T T"]:
    """Which keys each query sees: `layout.visible` with exchanged roles and one range per sample."""
    slots = layout.slots
    slot = jax.lax.broadcasted_iota(jnp.int32, slots.position.shape, 1)
    ordinal = jnp.where(is_prompt_text(layout, num_prompt), slot, -1)
    roles = Slots(slots.position, ordinal, slots.branch)
    both_text = (ordinal >= 0)[:, :, None] & (ordinal >= 0)[:, None, :]
    attention_range = jnp.maximum(1, num_prompt // TEXT_RANGE)
    near = ordinal[:, :, None] - ordinal[:, None, :] < attention_range[:, None, None]
    return visible(roles, roles, None) & (~both_text | near)


def is_prompt_text(layout: TokenLayout, num_prompt: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """Which slots hold text of the prompt: the first text slots, which are in text order."""
    return jnp.arange(layout.bucket.slots)[None, :] < num_prompt[:, None]


def feed_text(
    module: DecoderLayer,
    x: Float[Array, "B T D"],
    context: Context,
    reduction: Reduction,
    layer: Int[Array, ""],
    num_prompt: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Bool[Array, " B"]]:
    """A layer's second half with the Dynamic FFN for prompt text, simulated, and whether its probe scores were numbers."""
    y, weights, layout = module.ffn_norm(x), module.ffn.weights, context.layout
    num_text, num_visual = layout.bucket.text, layout.bucket.visual
    exchanged = TokenLayout(
        text_position=layout.visual_position,
        visual_position=layout.text_position,
        text_branch=jnp.zeros_like(layout.visual_position),
        num_text=layout.num_visual,
        num_visual=num_prompt,
        seed=layout.seed,
    )
    key = jax.random.fold_in(context.random_key, layer)
    turned = jnp.concatenate([y[:, num_text:], y[:, :num_text]], axis=1)
    reduced, kept = simulated_dynamic_ffn(turned, weights, exchanged, reduction, key)
    reduced = jnp.concatenate([reduced[:, num_visual:], reduced[:, :num_visual]], axis=1)
    # The answer follows the prompt in the text slots and is dense.
    chosen = jnp.where(is_prompt_text(layout, num_prompt)[:, :, None], reduced, dense_ffn(y, weights))
    return x + sum_over_shards(chosen), kept.scored
