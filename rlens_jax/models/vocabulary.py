"""Embedding and logits of a vocabulary whose rows are cut over the mesh's `model` axis.

Each shard holds V consecutive rows. The vocabulary is padded to a multiple of the shards, and the logits of padding are `MASKED`.
No shard ever holds all logits of a batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlens_jax.ops.attention import MASKED
from rlens_jax.sharding.model_axis import max_over_shards, num_shards, shard_index, stack_shards, sum_over_shards


def embed(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Embeddings of `ids`, which count the whole vocabulary; each comes from the shard that holds it."""
    if num_shards() == 1:
        return table[ids]
    place = ids - shard_index() * table.shape[0]
    held = (place >= 0) & (place < table.shape[0])
    rows = table[jnp.where(held, place, 0)]
    return sum_over_shards(jnp.where(held[..., None], rows, jnp.zeros_like(rows)))


def hide_padding(logits: Float[Array, "*B V"], vocabulary: int) -> Float[Array, "*B V"]:
    """Replaces the logits of padding, if the `vocabulary` does not fill all shards, by `MASKED`."""
    rows = logits.shape[-1]
    if rows * num_shards() == vocabulary:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + shard_index() * rows
    return jnp.where(ids < vocabulary, logits, jnp.float32(MASKED))


def argmax(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The id with the largest logit; ties go to the lower id."""
    best = logits.argmax(axis=-1).astype(jnp.int32)
    if num_shards() == 1:
        return best
    value = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    # Shards are in the order of their ids, and argmax takes the first of equals.
    winner = stack_shards(value).argmax(axis=0)[None]
    ids = stack_shards(best + shard_index() * logits.shape[-1])
    return jnp.take_along_axis(ids, winner, axis=0)[0]


def log_probability(logits: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log softmax(logits) at `ids`, in float32."""
    highest = max_over_shards(logits.max(axis=-1))
    total = sum_over_shards(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    place = ids - shard_index() * logits.shape[-1]
    held = (place >= 0) & (place < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, jnp.where(held, place, 0)[..., None], axis=-1)[..., 0]
    chosen = sum_over_shards(jnp.where(held, chosen, jnp.float32(0)))
    return chosen - highest - jnp.log(total)
