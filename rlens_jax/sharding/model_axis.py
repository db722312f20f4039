"""What model code asks of tensor parallelism: sums and places along the mesh's `model` axis.

A decoder runs inside one `jax.shard_map` over the mesh (our decision): every array is a shard, and these few functions are all
that its code says about it. Outside of a `shard_map` there is one shard, and each of them is the identity.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

WORK, MODEL = "work", "model"
"""The two axes of every mesh: batches lie along the first, the model's weights along the second."""


def model_axes() -> str | tuple[()]:
    """The axis to give to a collective: `model` inside of a `shard_map`, none outside."""
    return MODEL if MODEL in jax.sharding.get_abstract_mesh().manual_axes else ()


def num_shards() -> int:
    """How many shards the weights are cut into."""
    return jax.lax.axis_size(MODEL) if model_axes() else 1


def shard_index() -> Int[Array, ""]:
    """Which shard this is."""
    return jax.lax.axis_index(MODEL).astype(jnp.int32) if model_axes() else jnp.int32(0)


def sum_over_shards(x: Array) -> Array:
    """The sum of all shards' `x`, on every shard."""
    return jax.lax.psum(x, model_axes()) if model_axes() else x


def max_over_shards(x: Array) -> Array:
    """The elementwise largest of all shards' `x`, on every shard."""
    return jax.lax.pmax(x, model_axes()) if model_axes() else x


def join_shards(x: Array, axis: int) -> Array:
    """All shards' `x` joined along one of its axes, in their order."""
    return jax.lax.all_gather(x, MODEL, axis=axis, tiled=True) if model_axes() else x


def stack_shards(x: Array) -> Array:
    """All shards' `x` along a new leading axis."""
    return jax.lax.all_gather(x, MODEL) if model_axes() else x[None]


def on_any_shard(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `flag` holds anywhere in the mesh, so that loops end on all devices at once."""
    if not model_axes():
        return flag
    return jax.lax.pmax(flag.astype(jnp.int32), (WORK, MODEL)) > 0
