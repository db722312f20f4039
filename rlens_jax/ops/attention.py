"""Attention over packed slots: dense and Hollow (paper; details in method.md).

`masked_attention` is the plain reference: it forms the whole score matrix, so its Hollow form is *simulated*.
`packed_attention` is the measured path: queries go block by block, visual queries meet only the visual keys of their band
and the text keys, and no T x S matrix is formed for them. Dense causal attention is the same code with an endless band.

Axis letters: B batch, N query heads, K kv heads, G = N / K, T query tokens, S key tokens, H head dim; X text slots,
P visual slots.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlens_jax.layout import Slots, TokenLayout, Window, visible
from rlens_jax.ops.chunks import parts_of

MASKED = -1e30
"""Score of an invisible key: far below every real score, and finite, so that rows without keys stay numbers."""

DENSE_BLOCK, HOLLOW_BLOCK = 128, 64
"""Visual queries computed together (our decision, measured by `rlens_jax.bench`): a block meets whole blocks of keys, so
small ones waste fewer scores, and a narrow band affords smaller ones than the long rows of dense attention."""

SPANS = 8
"""Into how many parts the visual queries of dense attention are cut that is computed block by block, in turn."""

MOST_BLOCKS = 64
"""Each block is compiled by itself, so long runs of visual tokens are cut into larger ones."""


def masked_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """Softmax attention in float32 with grouped kv heads (never repeated); scores are scaled by H ** -0.5."""
    batch, num_heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    # Scaled before the product: H numbers a query instead of one a pair.
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    grouped = scaled.reshape(batch, kv_heads, num_heads // kv_heads, length, head_dim)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    # Added, not selected: the gradient of a select costs another pass over the scores.
    hidden = jnp.where(mask, jnp.float32(0), jnp.float32(MASKED))[:, None, None]
    scores = scores + hidden
    # Normalised after the values: one pass less over the scores than softmax, forwards and backwards.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(q.dtype).reshape(q.shape)


def reference_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: TokenLayout,
    attention_range: int | None,
    window: Window = "ordinal",
) -> Float[Array, "B N T H"]:
    """Dense (`attention_range` None) or simulated Hollow Attention of a packed batch."""
    return masked_attention(q, k, v, visible(layout.slots, layout.slots, attention_range, window))


def packed_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: TokenLayout,
    attention_range: int | None,
    window: Window = "ordinal",
    block: int | None = None,
) -> Float[Array, "B N T H"]:
    """The measured path; same result as `reference_attention`.

    A visual query of slot i sees visual slots in (i - R, i] only (also with the position window, whose distances are never
    smaller than ordinal ones), so each block of queries meets one static slice of keys beside the text.
    """
    num_text, num_visual = layout.bucket.text, layout.bucket.visual
    slots = layout.slots
    reach = num_visual if attention_range is None else attention_range - 1
    block = block or max(DENSE_BLOCK if attention_range is None else HOLLOW_BLOCK, num_visual // MOST_BLOCKS)

    def attend(start: int, stop: int, key_spans: list[tuple[int, int]]) -> Float[Array, "B N T H"]:
        query = Slots(slots.position[:, start:stop], slots.ordinal[:, start:stop])

        def pick(x: Array, axis: int) -> Array:
            parts = [jax.lax.slice_in_dim(x, a, b, axis=axis) for a, b in key_spans]
            return jnp.concatenate(parts, axis=axis)

        key = Slots(pick(slots.position, 1), pick(slots.ordinal, 1))
        mask = visible(query, key, attention_range, window)
        return masked_attention(q[:, :, start:stop], pick(k, 2), pick(v, 2), mask)

    total = num_text + num_visual
    outputs = [attend(0, num_text, [(0, total)])]
    for start in range(num_text, total, block):
        stop = min(start + block, total)
        outputs.append(attend(start, stop, [(0, num_text), (max(num_text, start - reach), stop)]))
    return jnp.concatenate(outputs, axis=2)


def attention_in_turn(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: TokenLayout,
    attention_range: int | None,
    window: Window = "ordinal",
    block: int = DENSE_BLOCK,
) -> Float[Array, "B N T H"]:
    """For long prompts: same result as `packed_attention`, with the scores of one block of queries there at a time.

    A compiler may well compute the blocks of `packed_attention` side by side, and then has all scores of a causal attention in
    memory. Here blocks are steps of loops. Steps have equal shapes, so in dense attention those of a span meet the keys up to
    the end of the span: with `SPANS` of them, a sixteenth more scores than needed.
    """
    num_text, num_visual = layout.bucket.text, layout.bucket.visual
    slots, total = layout.slots, num_text + num_visual
    if attention_range is None:
        edges = [num_text + num_visual * i // SPANS for i in range(SPANS + 1)]
        groups = [(start, stop, stop - num_text) for start, stop in pairwise(edges)]
        reach = num_visual
    else:
        reach = attention_range - 1
        groups = [(num_text, total, min(num_visual, block + reach))]
    output = jnp.zeros_like(q)
    for start, stop, width in ((0, num_text, num_visual), *groups):
        if start == stop:
            continue
        starts, size = parts_of(stop - start, block)

        def attend(
            output: Array, start: Array, size: int = size, stop: int = stop, width: int = width
        ) -> tuple[Array, None]:
            first = jnp.clip(start - reach, num_text, max(stop, num_text + width) - width)

            def queries(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

            def keys(x: Array, axis: int) -> Array:
                text = jax.lax.slice_in_dim(x, 0, num_text, axis=axis)
                return jnp.concatenate([text, jax.lax.dynamic_slice_in_dim(x, first, width, axis)], axis=axis)

            query, key = (Slots(of(slots.position, 1), of(slots.ordinal, 1)) for of in (queries, keys))
            mask = visible(query, key, attention_range, window)
            part = masked_attention(queries(q, 2), keys(k, 2), keys(v, 2), mask)
            return jax.lax.dynamic_update_slice_in_dim(output, part, start, axis=2), None

        output, _ = jax.lax.scan(attend, output, jnp.asarray(starts + np.int32(start)))
    return output
