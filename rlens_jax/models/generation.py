"""Greedy generation with a KV cache: one prefill under a plan, then plain decoding steps (paper: a plan drops nothing).

Where visual tokens are dropped between layers, the layers behind hold fewer tokens and have a smaller part of the cache.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.models.cache import KVCache, join_caches
from rlens_jax.models.decoder import Decoder, TracedPlan
from rlens_jax.models.layers import all_finite, best_token, mark_tokens, penalised
from rlens_jax.models.prompt import FILLER, PromptBatch
from rlens_jax.models.pruned import run_prompt
from rlens_jax.ops.attention import Kernel
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import Pruning
from rlens_jax.sharding.model_axis import on_any_shard

Tokens = tuple[int, ...]
"""Numbers of some tokens of the vocabulary."""


@dataclass(frozen=True)
class Penalty:
    """A repetition penalty, as Hugging Face's `generate` applies it to greedy decoding.

    Attributes:
        factor: logits of tokens that are there already are divided by it, or multiplied where they are negative.
        of_prompt: whether the tokens of the prompt count, or new ones only.
        placeholders: the tokens that stand for visual tokens in a prompt with images.
    """

    factor: float
    of_prompt: bool = True
    placeholders: Tokens = ()


def prefill(
    decoder: Decoder,
    visual: Float[Array, "B P visual_width"],
    batch: PromptBatch,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    new_tokens: int,
    random_key: Array,
    kernel: Kernel = "packed",
    pruning: Pruning | None = None,
    chunk: int | None = None,
    penalty: Penalty | None = None,
) -> tuple[Int[Array, "B Q"], KVCache, Bool[Array, "B Q"]]:
    """First new token of each branch, a cache with room for `new_tokens` each, and whether all scores and logits were finite.

    `kernel` and `chunk` are those of `Context`. Logits are computed for the last token of each prompt only.
    """
    states = run_prompt(decoder, visual, batch, plan, reduction, random_key, kernel, pruning, chunk)
    prompt_end = jnp.asarray(batch.prompt_end)
    logits = decoder.logits(jnp.take_along_axis(states.x, prompt_end[:, :, None], axis=1))
    room = new_tokens * prompt_end.shape[1]
    caches = [decoder.make_cache(part.record, part.layout, room, part.shift) for part in states.parts]
    cache = join_caches(caches, batch.layout.bucket.slots + room)
    first = logits if penalty is None else penalised(logits, _seen(batch, penalty, logits.shape[-1]), penalty.factor)
    return best_token(first), cache, states.scored[:, None] & all_finite(logits)


def decode(
    decoder: Decoder,
    first: Int[Array, "B Q"],
    cache: KVCache,
    batch: PromptBatch,
    new_tokens: int,
    stop_tokens: Tokens | Int[Array, " stops"],
    penalty: Penalty | None = None,
) -> tuple[Int[Array, "B Q Y"], Bool[Array, "B Q"]]:
    """`new_tokens` greedy tokens of each branch, `first` included, and whether all logits were finite.

    After one of the `stop_tokens` a branch only repeats it. The loop ends when all branches have stopped.
    """
    axes = batch.rope_positions.shape[1]
    rows, branches = first.shape
    longest = batch.layout.bucket.slots + branches * new_tokens
    filler = jnp.asarray(batch.samples) == FILLER
    tokens = jnp.full((rows, branches, new_tokens), next(iter(stop_tokens), 0), jnp.int32).at[:, :, 0].set(first)

    def running(carry: Any) -> Array:
        step, any_unfinished, *_ = carry
        return (step < new_tokens) & any_unfinished

    def advance(carry: Any) -> Any:
        step, _, token, tokens, finite, cache, seen = carry
        position = batch.next_position + step - 1
        rope = jnp.broadcast_to((batch.next_rope + step - 1)[:, None], (rows, axes, branches))
        logits, cache = decoder.decode(token, cache, position, rope, branches * (new_tokens + 1 - step), longest)
        ended = is_any(token, stop_tokens)
        if penalty is None:
            best = best_token(logits)
        else:
            seen = mark_tokens(seen, token[:, :, None], everywhere)
            best = best_token(penalised(logits, seen, penalty.factor))
        newest = jnp.where(ended, token, best)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, newest[:, :, None], step, axis=2)
        return step + 1, unfinished(newest), newest, tokens, finite & (ended | all_finite(logits)), cache, seen

    def unfinished(token: Array) -> Array:
        return on_any_shard(~(is_any(token, stop_tokens) | filler).all())

    finite, everywhere = jnp.ones((rows, branches), bool), jnp.ones((rows, branches, 1), bool)
    seen = None if penalty is None else _seen(batch, penalty, decoder.embedding.shape[0])
    started = jnp.int32(1), unfinished(first), first, tokens, finite, cache, seen
    return jax.lax.while_loop(running, advance, started)[3:5]


def _seen(batch: PromptBatch, penalty: Penalty, rows: int) -> Bool[Array, "B Q V"]:
    """The tokens of each branch's prompt that the penalty counts, among this shard's `rows` of the vocabulary."""
    count, branches = batch.samples.shape
    seen = jnp.zeros((count, branches, rows), bool)
    if not penalty.of_prompt:
        return seen
    layout, ids = batch.layout, jnp.asarray(batch.text_ids)[:, None, :]
    there = jnp.arange(ids.shape[2])[None, :] < jnp.asarray(layout.num_text)[:, None]
    branch = jnp.asarray(layout.text_branch)[:, None, :]
    mine = (branch == 0) | (branch == jnp.arange(1, branches + 1)[None, :, None])
    seen = mark_tokens(seen, ids, there[:, None, :] & mine)
    if penalty.placeholders:
        tokens = jnp.broadcast_to(jnp.array(penalty.placeholders, jnp.int32), (count, branches, len(penalty.placeholders)))
        seen = mark_tokens(seen, tokens, jnp.broadcast_to((jnp.asarray(layout.num_visual) > 0)[:, None, None], tokens.shape))
    return seen


def is_any(tokens: Int[Array, "*B"], of: Tokens | Int[Array, " stops"]) -> Bool[Array, "*B"]:
    """Whether each token is one `of` these."""
    return jnp.stack([tokens == number for number in of] or [jnp.zeros(tokens.shape, bool)]).any(axis=0)
