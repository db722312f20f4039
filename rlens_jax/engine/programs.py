"""The compiled programs of a run: one per (program, bucket), whatever the plan, which is data.

Every program runs on a mesh: the rows of a batch are split into as many blocks as the mesh has work groups, each group with a
plan of its own (all groups the same one, unless there are fewer blocks than groups). One CPU is a mesh of one group. The vision
tower is partitioned by XLA; the decoder runs inside one `shard_map` (`rlens_jax.sharding.model_axis`).

`layers` runs any consecutive layers under any plan. Base states and candidates go through this one program, so what it
computes from a stored state is bit-equal to what it would have computed from the start.
Axis letters: I images, B batch (rows of all work groups), T packed slots, P visual slots, D width, A answer slots,
Y new tokens, W work groups, L layers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.checkpoints.leaves import axes_of
from rlens_jax.models import vocabulary
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import IGNORE, PromptBatch
from rlens_jax.ops.attention import Kernel
from rlens_jax.plan import Plan, Reduction
from rlens_jax.sharding.mesh import ParameterLayout, fetch_blocks, put_rows, split_over
from rlens_jax.sharding.model_axis import MODEL, WORK

States = tuple[Float[Array, "B T D"], Bool[Array, " B"]]
"""The states that enter a layer, and whether all probe scores so far were numbers."""

ROWS, EVERYWHERE = PartitionSpec(WORK), PartitionSpec()


class ModelPrograms:
    """A model on a mesh as jitted functions; its parameters are flattened once and passed as plain arrays.

    Args:
        model: a family's module with `vision` and `decoder`, laid out on `mesh` (or abstract, to be lowered only).
        mesh: the devices.
    """

    def __init__(self, model: Any, mesh: Mesh):
        graph, state = nnx.split(model)
        self._graph = graph
        self._variables = nnx.to_flat_state(state)
        layout = ParameterLayout(mesh, axes_of(model))
        self._leaves = [variable.get_value() for _, variable in self._variables]
        self._specs = [
            layout.spec(".".join(map(str, path)), leaf.shape)
            for (path, _), leaf in zip(self._variables, self._leaves, strict=True)
        ]
        self.config = model.decoder.config
        self.dtype = model.decoder.embedding.get_value().dtype
        self.mesh = mesh
        self.kernel: Kernel = "splash" if mesh.devices.flat[0].platform == "tpu" else "packed"
        """What computes the attention of a prefill."""
        self.traces: Counter[str] = Counter()
        """How often each program was traced: once per bucket, or something is wrong."""
        # A tower may go image by image: each group's own ones. Along `model`, XLA cuts it as its weights lie.
        self._encode = self._split("encode", self._encode_impl, (ROWS,), ROWS, cut=False)

    @property
    def groups(self) -> int:
        """Work groups, W."""
        return self.mesh.shape[WORK]

    def encode(self, *arrays: np.ndarray) -> Float[Array, "I j D"]:
        """Visual tokens of a batch of prepared images of one bucket; each process gives those of its own groups."""
        return self._encode(put_rows(arrays, self.mesh))

    def put(self, rows: Float[np.ndarray, "rows P D"]) -> Float[Array, "B P D"]:
        """Rows of this process's groups, on their devices."""
        return put_rows(rows, self.mesh)

    def _model(self, leaves: list[Array]) -> Any:
        filled = [
            (path, variable.replace(leaf)) for (path, variable), leaf in zip(self._variables, leaves, strict=True)
        ]
        return nnx.merge(self._graph, nnx.from_flat_state(filled))

    def _split(
        self,
        name: str,
        function: Callable[..., Any],
        in_specs: tuple[Any, ...],
        out_specs: Any,
        *,
        cut: bool = True,
    ) -> Callable[..., Any]:
        """`function` on each group's rows; its arguments after the model lie as `in_specs` say.

        With `cut` it sees shards of the model too, else all of it, and XLA cuts it.
        """

        def counted(leaves: list[Array], *arguments: Any) -> Any:
            self.traces[name] += 1
            return function(self._model(leaves), *arguments)

        model_specs = self._specs if cut else EVERYWHERE
        axes = (WORK, MODEL) if cut else (WORK,)
        program = jax.jit(split_over(counted, self.mesh, axes, (model_specs, *in_specs), out_specs))
        return partial(program, self._leaves)

    def _encode_impl(self, model: Any, arrays: tuple[Array, ...]) -> Array:
        return model.vision(*arrays)


class Programs(ModelPrograms):
    """The functions of a search, jitted over one model.

    Args:
        model: a family's module with `vision` and `decoder`, laid out on `mesh` (or abstract, to be lowered only).
        mesh: the devices.
        reduction: how reduced layers treat visual tokens.
        seed: draws random probes.
        new_tokens: most tokens that `generate` makes.
        stop_token: the token that ends a turn.
    """

    def __init__(
        self,
        model: Any,
        mesh: Mesh,
        reduction: Reduction,
        *,
        seed: int,
        new_tokens: int,
        stop_token: int,
    ):
        super().__init__(model, mesh)
        self.reduction = reduction
        self.seed = seed
        self.new_tokens = new_tokens
        self.stop_token = stop_token
        self._embed = self._split("embed", self._embed_impl, (ROWS,) * 2, ROWS)
        self._layers = self._split("layers", self._layers_impl, (ROWS,) * 5, ROWS)
        self._outcome = self._split("outcome", self._outcome_impl, (ROWS,) * 2, EVERYWHERE)
        self._generate = self._split("generate", self._generate_impl, (ROWS,) * 3, EVERYWHERE)
        self._route = self._split("route", self._route_impl, (ROWS,) * 2, ROWS)
        self._choose = self._split("choose", self._choose_impl, (ROWS,) * 3, ROWS)

    def embed(self, text_ids: Int[Array | np.ndarray, "B X"], visual: Float[np.ndarray, "rows P D"]) -> States:
        """Packed embeddings, the states before the first layer; the visual tokens come from the host."""
        return self._embed(text_ids, self.put(visual))

    def layers(
        self, states: States, batch: PromptBatch, plans: Sequence[Plan], starts: Sequence[int], stop: int
    ) -> States:
        """The states after layers `starts[g]` .. `stop` - 1 of each group g under its plan."""
        bounds = (np.array(starts, np.int32), np.full(self.groups, stop, np.int32))
        return self._layers(states, batch, self.traced(plans), *map(self._per_group, bounds))

    def outcome(
        self, states: States, batch: PromptBatch
    ) -> tuple[Int[Array, " B"], Bool[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
        """From the last states: each row's sample, whether every answer token is the argmax, the mean log-probability
        of the answer, and whether every probe score was a number; all rows on every device.
        """
        return self._outcome(states, batch)

    def generate(
        self, visual: Float[Array, "B P D"], batch: PromptBatch, plans: Sequence[Plan]
    ) -> tuple[Int[Array, " B"], Int[Array, "B Y"], Bool[Array, " B"]]:
        """Each row's sample, the greedy continuation of its bare prompt, and whether every probe score was a number;
        all rows on every device.
        """
        return self._generate(visual, batch, self.traced(plans))

    def route(self, arrays: Any, sources: Sequence[int]) -> Any:
        """Arrays with leading axis B as if group g had the rows of group `sources[g]`; nothing moves where all have their own."""
        if list(sources) == list(range(self.groups)):
            return arrays
        return self._route(arrays, self._per_group(np.array(sources, np.int32)))

    def choose(self, first: Sequence[bool], states: States, others: States) -> States:
        """Each group g's rows of `states` where `first[g]`, else of `others`."""
        return self._choose(states, others, self._per_group(np.array(first)))

    def lower(self, name: str, *arguments: Any) -> jax.stages.Lowered:
        """A program by its name, such as `layers`, traced for abstract arguments (shape, dtype, sharding); nothing runs.

        `layers` takes a `TracedPlan` and int32 starts and stops, one row a work group.
        """
        program = getattr(self, f"_{name}")
        return program.func.lower(*program.args, *arguments)

    def static_prefill(self, plan: Plan) -> Callable[[Float[Array, "B P D"], PromptBatch], Any]:
        """A prefill up to the first new token that is compiled for one plan alone, as a deployed model would run it."""

        def run(model: Any, visual: Array, batch: PromptBatch) -> Array:
            key = self._random_key()
            return prefill(model.decoder, visual, batch, plan, self.reduction, 1, key, self.kernel)[0]

        return self._split("static prefill", run, (ROWS, ROWS), ROWS)

    def traced(self, plans: Sequence[Plan]) -> TracedPlan:
        """One plan a group, as data on the devices."""
        flags = zip(*(plan.flags(self.config.num_layers) for plan in plans), strict=True)
        return TracedPlan(*(self._per_group(np.stack(rows)) for rows in flags))

    def _per_group(self, values: np.ndarray) -> Array:
        sharding = NamedSharding(self.mesh, ROWS)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def _random_key(self) -> Array:
        return jax.random.key(self.seed)

    def _embed_impl(self, model: Any, text_ids: Array, visual: Array) -> States:
        return model.decoder.embed(text_ids, visual), jnp.ones(text_ids.shape[0], bool)

    def _layers_impl(
        self, model: Any, states: States, batch: PromptBatch, plans: TracedPlan, start: Array, stop: Array
    ) -> States:
        x, scored = states
        decoder, key = model.decoder, self._random_key()
        context = decoder.context(batch.layout, batch.rope_positions, key, self.kernel)
        x, now = decoder.run_layers(x, context, own_plan(plans), self.reduction, start[0], stop[0])
        return x, scored & now

    def _outcome_impl(self, model: Any, states: States, batch: PromptBatch) -> tuple[Array, ...]:
        x, scored = states
        answers = jnp.take_along_axis(x, batch.answer_slots[:, :, None], axis=1)
        logits = model.decoder.logits(answers)
        counts = batch.answer_targets != IGNORE
        targets = jnp.where(counts, batch.answer_targets, 0)
        right = ((vocabulary.argmax(logits) == targets) | ~counts).all(axis=1)
        log_probability = jnp.where(counts, vocabulary.log_probability(logits, targets), 0.0)
        total = log_probability.sum(axis=1)
        count = jnp.maximum(1, counts.sum(axis=1)).astype(jnp.float32)
        return _all_rows((batch.layout.sample, right & jnp.isfinite(total), total / count, scored))

    def _generate_impl(
        self, model: Any, visual: Array, batch: PromptBatch, plans: TracedPlan
    ) -> tuple[Array, Array, Array]:
        first, cache, scored = prefill(
            model.decoder,
            visual,
            batch,
            own_plan(plans),
            self.reduction,
            self.new_tokens,
            self._random_key(),
            self.kernel,
        )
        tokens = decode(model.decoder, first, cache, batch, self.new_tokens, self.stop_token)
        return _all_rows((batch.layout.sample, tokens, scored))

    def _route_impl(self, model: Any, arrays: Any, source: Array) -> Any:
        return jax.tree.map(lambda x: fetch_blocks(x, source[0]), arrays)

    def _choose_impl(self, model: Any, states: States, others: States, first: Array) -> States:
        return jax.tree.map(lambda x, other: jnp.where(first[0], x, other), states, others)


def own_plan(plans: TracedPlan) -> TracedPlan:
    """Inside of a `shard_map`: this group's plan."""
    return TracedPlan(plans.hollow[0], plans.dynamic[0])


def _all_rows(arrays: Any) -> Any:
    """All groups' rows on every device: outcomes are small, and every process decides by all of them."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, WORK, tiled=True), arrays)
