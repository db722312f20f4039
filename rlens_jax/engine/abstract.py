"""Abstract models and batches: shapes, dtypes and places on the mesh. Nothing is allocated and no weight is read.

Axis letters as in `rlens_jax.engine.programs`; W work groups.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from rlens_jax.checkpoints.leaves import layout_of
from rlens_jax.engine.programs import Programs
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket, TokenLayout
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.sharding.mesh import rows_sharding

ANSWER_SLOTS = 16
"""Answer tokens of a row (our assumption; a run takes the next power of two of its longest reference answer)."""


@dataclass(frozen=True)
class Placed:
    """Makes abstract arrays whose leading axis is the batch, or the work groups."""

    mesh: Mesh

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(self.mesh))


def abstract_model(kind: ModelKind, dtype: DTypeLike, mesh: Mesh) -> nnx.Module:
    """The model as `load_model` lays it out, with shapes, dtypes and shardings in place of arrays."""
    graph, state = nnx.split(kind.abstract(dtype))
    layout = layout_of(nnx.merge(graph, state), mesh)

    def placed(path: tuple[Any, ...], variable: Any) -> Any:
        name, leaf = ".".join(map(str, path)), variable.get_value()
        shape, axes = layout.held(name, leaf.shape)
        sharding = layout.sharding(name, layout.shape(name, leaf.shape))
        return variable.replace(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding), axes=axes)

    flat = [(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def bytes_on_device(arrays: Any) -> int:
    """Bytes that a tree of abstract arrays takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )


def abstract_batch(bucket: Bucket, rows: int, rope_axes: int, place: Placed) -> PromptBatch:
    """A batch of prompts of one bucket, `rows` on all work groups together."""

    def numbers(*shape: int) -> Any:
        return place((rows, *shape), jnp.int32)

    return PromptBatch(
        text_ids=numbers(bucket.text),
        layout=TokenLayout(numbers(bucket.text), numbers(bucket.visual), numbers(), numbers(), numbers()),
        rope_positions=numbers(rope_axes, bucket.slots),
        next_rope=numbers(),
        answer_slots=numbers(ANSWER_SLOTS),
        answer_targets=numbers(ANSWER_SLOTS),
    )


def decoder_arguments(programs: Programs, bucket: Bucket, rows: int) -> dict[str, tuple[Any, ...]]:
    """By the name of each of the decoder's programs, its arguments for batches of `rows` rows in all."""
    place, config = Placed(programs.mesh), programs.config
    batch = abstract_batch(bucket, rows, len(config.rope_sections), place)
    visual = place((rows, bucket.visual, config.width), programs.dtype)
    states = (place((rows, bucket.slots, config.width), programs.dtype), place((rows,), jnp.bool_))
    flags: Any = place((programs.groups, config.num_layers), jnp.bool_)
    bound = place((programs.groups,), jnp.int32)
    plans = TracedPlan(flags, flags)
    return {
        "embed": (batch.text_ids, visual),
        "layers": (states, batch, plans, bound, bound),
        "outcome": (states, batch),
        "generate": (visual, batch, plans),
    }
