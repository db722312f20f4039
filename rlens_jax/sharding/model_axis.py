"""Collectives over the mesh's `model` axis, for model code.

A decoder runs inside one `jax.shard_map` over the mesh (our decision), so every array is a shard. Model code handles that with
these functions only. Outside a `shard_map` there is one shard, and each function is the identity.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
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


def split_heads(function: Callable[..., Array], heads: int) -> Callable[..., Array]:
    """`function` on shards of the heads, in a program that XLA cuts along `model`; elsewhere it is the same.

    XLA cannot cut a TPU kernel. Arrays with more than two axes, and the result, are [rows, heads, ...]; others are whole. Heads
    that do not divide are whole on every shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if MODEL not in mesh.axis_names or MODEL in mesh.manual_axes:
        return function
    cut = PartitionSpec(None, MODEL) if heads % mesh.shape[MODEL] == 0 else PartitionSpec()

    def on_shards(*arrays: Array) -> Array:
        specs = tuple(cut if array.ndim > 2 else PartitionSpec() for array in arrays)
        # A TPU kernel does not declare over which axes its outputs vary.
        return jax.shard_map(function, in_specs=specs, out_specs=cut, axis_names={MODEL}, check_vma=False)(*arrays)

    return on_shards
