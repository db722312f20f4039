"""The compiled programs of a run: one per (program, bucket), whatever the plan, which is data.

`layers` runs any consecutive layers under any plan. Base states and candidates go through this one program, so what it
computes from a stored state is bit-equal to what it would have computed from the start.
Axis letters: I images, B batch, T packed slots, P visual slots, D width, A answer slots, Y new tokens.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import IGNORE, PromptBatch
from rlens_jax.plan import Reduction


class Programs:
    """Jitted functions over one model; its parameters are flattened once and passed as plain arrays.

    Args:
        model: a family's module with `vision` and `decoder`.
        reduction: how reduced layers treat visual tokens.
        seed: draws random probes.
        new_tokens: most tokens that `generate` makes.
        stop_token: the token that ends a turn.
    """

    def __init__(self, model: Any, reduction: Reduction, *, seed: int, new_tokens: int, stop_token: int):
        graph, state = nnx.split(model)
        self._leaves, self._tree = jax.tree.flatten(state)
        self._graph = graph
        self.config = model.decoder.config
        self.reduction = reduction
        self.seed = seed
        self.new_tokens = new_tokens
        self.stop_token = stop_token
        self.traces: Counter[str] = Counter()
        """How often each program was traced: once per bucket, or something is wrong."""
        self._encode = self._program(self._encode_impl)
        self._embed = self._program(self._embed_impl)
        self._layers = self._program(self._layers_impl)
        self._outcome = self._program(self._outcome_impl)
        self._generate = self._program(self._generate_impl)

    def _program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.strip("_").removesuffix("_impl")

        @jax.jit
        def program(leaves: list[Array], *arguments: Any) -> Any:
            self.traces[name] += 1
            return function(nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves)), *arguments)

        return partial(program, self._leaves)

    def encode(self, *arrays: Array | np.ndarray) -> Float[Array, "I j D"]:
        """Visual tokens of a batch of prepared images of one bucket."""
        return self._encode(*arrays)

    def embed(self, text_ids: Int[Array, "B X"], visual: Float[Array, "B P D"]) -> Float[Array, "B T D"]:
        """Packed embeddings, the states before the first layer."""
        return self._embed(text_ids, visual)

    def layers(
        self, x: Float[Array, "B T D"], batch: PromptBatch, plan: TracedPlan, start: int, stop: int
    ) -> tuple[Float[Array, "B T D"], Bool[Array, " B"]]:
        """States after layers `start` .. `stop` - 1, and whether every probe score was a number."""
        return self._layers(x, batch, plan, jnp.int32(start), jnp.int32(stop))

    def outcome(
        self, x: Float[Array, "B T D"], batch: PromptBatch
    ) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
        """From the last states: is every answer token the argmax, and the mean log-probability of the answer."""
        return self._outcome(x, batch)

    def generate(
        self, visual: Float[Array, "B P D"], batch: PromptBatch, plan: TracedPlan
    ) -> tuple[Int[Array, "B Y"], Bool[Array, " B"]]:
        """Greedy continuation of bare prompts, and whether every probe score was a number."""
        return self._generate(visual, batch, plan)

    def _random_key(self) -> Array:
        return jax.random.key(self.seed)

    def _encode_impl(self, model: Any, *arrays: Array) -> Array:
        return model.vision(*arrays)

    def _embed_impl(self, model: Any, text_ids: Array, visual: Array) -> Array:
        return model.decoder.embed(text_ids, visual)

    def _layers_impl(
        self, model: Any, x: Array, batch: PromptBatch, plan: TracedPlan, start: Array, stop: Array
    ) -> tuple[Array, Array]:
        context = model.decoder.context(batch.layout, batch.rope_positions, self._random_key())
        return model.decoder.run_layers(x, context, plan, self.reduction, start, stop)

    def _outcome_impl(self, model: Any, x: Array, batch: PromptBatch) -> tuple[Array, Array]:
        answers = jnp.take_along_axis(x, batch.answer_slots[:, :, None], axis=1)
        logits = model.decoder.logits(answers)
        counts = batch.answer_targets != IGNORE
        targets = jnp.where(counts, batch.answer_targets, 0)
        right = ((logits.argmax(axis=-1) == targets) | ~counts).all(axis=1)
        log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)[
            :, :, 0
        ]
        total = jnp.where(counts, log_probability, 0.0).sum(axis=1)
        count = jnp.maximum(1, counts.sum(axis=1)).astype(jnp.float32)
        return right & jnp.isfinite(total), total / count

    def _generate_impl(
        self, model: Any, visual: Array, batch: PromptBatch, plan: TracedPlan
    ) -> tuple[Array, Array]:
        first, cache, scored = prefill(
            model.decoder, visual, batch, plan, self.reduction, self.new_tokens, self._random_key()
        )
        return decode(model.decoder, first, cache, batch, self.new_tokens, self.stop_token), scored
