"""Greedy generation with a KV cache: one prefill under a plan, then plain decoding steps (paper: nothing is dropped).

Axis letters: B batch, X text slots, P visual slots, D width, Y new tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.models import vocabulary
from rlens_jax.models.decoder import Decoder, KVCache, TracedPlan
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.splash import Kernel
from rlens_jax.parallel.model_axis import on_any_shard
from rlens_jax.plan import Plan, Reduction


def prefill(
    decoder: Decoder,
    visual: Float[Array, "B P D"],
    batch: PromptBatch,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    new_tokens: int,
    random_key: Array,
    kernel: Kernel = "packed",
    chunk: int | None = None,
) -> tuple[Int[Array, " B"], KVCache, Bool[Array, " B"]]:
    """First new token of each prompt, cache with room for `new_tokens` more, and whether probe scores were numbers.

    `kernel` and `chunk` are those of `Context`. Logits are made of the last token of each prompt only.
    """
    context = decoder.context(batch.layout, batch.rope_positions, random_key, kernel, chunk)
    x, record = decoder.prefill(decoder.embed(batch.text_ids, visual), context, plan, reduction)
    last_text = jnp.take_along_axis(x, (batch.layout.num_text - 1)[:, None, None], axis=1)
    first = vocabulary.argmax(decoder.logits(last_text)[:, 0])
    return first, decoder.make_cache(record, batch.layout, new_tokens), record.kept.scored.all(axis=0)


def decode(
    decoder: Decoder,
    first: Int[Array, " B"],
    cache: KVCache,
    batch: PromptBatch,
    new_tokens: int,
    stop_token: int,
) -> Int[Array, "B Y"]:
    """The `new_tokens` greedy tokens that begin with `first`; after a sample's `stop_token` it only repeats that.

    The loop ends as soon as all samples have stopped.
    """
    batch_size = first.shape[0]
    prefill_slots = cache.position.shape[1] - new_tokens
    axes = batch.rope_positions.shape[1]
    tokens = jnp.full((batch_size, new_tokens), stop_token, jnp.int32).at[:, 0].set(first)

    def running(carry: Any) -> Array:
        step, going_on, _, _, _ = carry
        return (step < new_tokens) & going_on

    def advance(carry: Any) -> Any:
        step, _, token, tokens, cache = carry
        position = batch.layout.num_tokens + step - 1
        rope = jnp.broadcast_to((batch.next_rope + step - 1)[:, None], (batch_size, axes))
        logits, cache = decoder.decode(token, cache, position, rope, prefill_slots + step - 1)
        following = jnp.where(token == stop_token, stop_token, vocabulary.argmax(logits))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, following[:, None], step, axis=1)
        return step + 1, unfinished(following), following, tokens, cache

    def unfinished(token: Array) -> Array:
        return on_any_shard((token != stop_token).any())

    return jax.lax.while_loop(running, advance, (jnp.int32(1), unfinished(first), first, tokens, cache))[3]
