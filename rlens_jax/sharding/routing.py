"""Carrying blocks of rows between work groups, for plans that are evaluated side by side."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlens_jax.sharding.model_axis import WORK


def fetch_blocks(x: Array, source: Int[Array, ""]) -> Array:
    """Inside of a `shard_map`: the block of work group `source`, bit for bit.

    One group after the other sends its block to all, so no device ever holds more than two: an all-gather would hold as many
    as there are groups.
    """
    groups = jax.lax.axis_size(WORK)
    if groups == 1:
        return x
    own = jax.lax.axis_index(WORK)
    # Sums of one number and zeros are exact for integers only, so numbers travel as their bits.
    bits = _bits(x)

    def receive(group: Array, fetched: Array) -> Array:
        sent = jax.lax.psum(jnp.where(own == group, bits, jnp.zeros_like(bits)), WORK)
        return jnp.where(source == group, sent, fetched)

    fetched = jax.lax.fori_loop(0, groups, receive, jnp.zeros_like(bits))
    return fetched.astype(bool) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(fetched, x.dtype)


def _bits(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int8)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
