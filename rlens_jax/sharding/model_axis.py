"""Collectives over the mesh's `model` axis, for model code.

A decoder runs inside one `jax.shard_map` over the mesh (our decision), so every array is a shard. Model code handles that with
these functions only. Outside a `shard_map` there is one shard, and each function is the identity.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

WORK, MODEL = "work", "model"
"""The two axes of every mesh: batches are split over the first, the model's weights over the second."""


def model_axes() -> str | tuple[()]:
    """The axis for a collective: `model` inside a `shard_map`, none outside."""
    return MODEL if MODEL in jax.sharding.get_abstract_mesh().manual_axes else ()


def num_shards() -> int:
    """Number of shards of the weights."""
    return jax.lax.axis_size(MODEL) if model_axes() else 1


def shard_index() -> Int[Array, ""]:
    """Index of this shard."""
    return jax.lax.axis_index(MODEL).astype(jnp.int32) if model_axes() else jnp.int32(0)


def sum_over_shards(x: Array) -> Array:
    """The sum of `x` over all shards, on every shard."""
    return jax.lax.psum(x, model_axes()) if model_axes() else x


def max_over_shards(x: Array) -> Array:
    """The elementwise maximum of `x` over all shards, on every shard."""
    return jax.lax.pmax(x, model_axes()) if model_axes() else x


def join_shards(x: Array, axis: int) -> Array:
    """`x` of all shards, concatenated along `axis` in the order of the shards."""
    return jax.lax.all_gather(x, MODEL, axis=axis, tiled=True) if model_axes() else x


def stack_shards(x: Array) -> Array:
    """`x` of all shards, stacked along a new leading axis."""
    return jax.lax.all_gather(x, MODEL) if model_axes() else x[None]


def on_any_shard(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `flag` is true on any device of the mesh, so that loops end on all devices at once."""
    if not model_axes():
        return flag
    return jax.lax.pmax(flag.astype(jnp.int32), (WORK, MODEL)) > 0
