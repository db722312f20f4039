"""Attention over packed slots, dense and Hollow (paper; docs/method.md).

The range R of Hollow Attention counts visual tokens. With R = 0 (`TEXT`) visual tokens attend to text only; the result of a
token without text before it is 0. Attention that visual tokens skip is that of the text slots alone (`attend_text`).

`masked_attention` is the plain reference. It forms the whole score matrix, so its Hollow form is *simulated*. The other paths
have the same result and are *measured*. They compute queries block by block, and each block of visual queries meets one static
slice of visual keys and the text keys. No T x S matrix is formed. In dense attention the slice begins at the first visual key.
`attend` chooses between these paths and the kernels of TPUs (`rlens_jax.ops.attention_tpu`) and NVIDIA GPUs
(`rlens_jax.ops.attention_gpu`).
"""

from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from rlens_jax.console import say
from rlens_jax.layout import KV, Queries, Range, Slots, TokenLayout, Window, visible
from rlens_jax.ops.attention_gpu import compile_error, cudnn_attention, cudnn_text_attention, refusal
from rlens_jax.ops.attention_tpu import splash_attention, splash_text_attention
from rlens_jax.plans import TEXT

TextQueries = Float[Array, "B N X H"]
"""Queries, or outputs of attention, of the text slots or of any others."""

Kernel = Literal["packed", "splash", "cudnn"]
"""What computes the attention of a prefill: plain XLA, the TPU's Pallas kernel, or cuDNN's on an NVIDIA GPU."""

MASKED = -1e30
"""Score of an invisible key. It is far below every real score, and finite, so rows without visible keys stay finite."""

DENSE_BLOCK, HOLLOW_BLOCK = 128, 64
"""Visual queries per block (our decision, measured by `rlens_jax.bench`). A block meets whole blocks of keys, so small blocks
waste fewer scores. The narrow band of Hollow Attention affords smaller blocks than the long rows of dense attention. Prompts of
at most DENSE_BLOCK visual slots take half of both."""

DENSE_SPANS = 8
"""Number of spans into which `chunked_attention` cuts the visual queries of dense attention."""

MAX_BLOCKS = 64
"""Max blocks per prompt in `packed_attention`, which compiles each block separately. Longer prompts use larger blocks."""


def suited_kernel(device: Any, dtype: DTypeLike, head_dim: int) -> Kernel:
    """The kernel for a prefill on such a device of JAX; where cuDNN refuses or fails to compile, a line says so once."""
    if device.platform == "tpu":
        return "splash"
    if device.platform != "gpu":
        return "packed"
    if (why := refusal(dtype, head_dim) or compile_error(head_dim)) is None:
        return "cudnn"
    _say_once(f"attention by plain XLA, not by cuDNN: {why}")
    return "packed"


@cache
def _say_once(line: str) -> None:
    say(line)


def attend(
    q: Queries,
    k: KV,
    v: KV,
    layout: TokenLayout,
    attention_range: Range,
    window: Window = "ordinal",
    *,
    kernel: Kernel,
    chunked: bool = False,
) -> Queries:
    """Dense (`attention_range` None) or Hollow Attention of a packed batch.

    The result is the same for each kernel. `splash` runs on a TPU (in tests under `pltpu.force_tpu_interpret_mode`) and has no
    gradient. `cudnn` has none either, and computes the same pieces in plain XLA where there is no cuDNN; for the position window
    plain XLA takes its place. `chunked` saves memory in plain XLA for long prompts; the kernels hold no scores in memory
    anyway. A range that all visual slots lie in takes the program of dense attention.
    """
    if attention_range is not None and attention_range >= layout.bucket.visual and window == "ordinal":
        attention_range = None
    if kernel == "splash":
        return splash_attention(q, k, v, layout, attention_range, window)
    if kernel == "cudnn":
        if window == "ordinal" or attention_range in (None, TEXT):
            return cudnn_attention(q, k, v, layout, attention_range)
        # Its band counts slots. In positions the band of a token is as much narrower as there is text between its images.
        _say_once("attention by plain XLA, not by cuDNN: its window counts visual tokens, not positions")
    attention = chunked_attention if chunked else packed_attention
    return attention(q, k, v, layout, attention_range, window)


def attend_text(q: TextQueries, k: KV, v: KV, layout: TokenLayout, *, kernel: Kernel, chunked: bool = False) -> TextQueries:
    """The rows of dense attention in text slots alone, from the queries of these slots; otherwise as `attend`."""
    if kernel == "splash":
        return splash_text_attention(q, k, v, layout)
    if kernel == "cudnn":
        return cudnn_text_attention(q, k, v, layout)
    return (chunked_text_attention if chunked else packed_text_attention)(q, k, v, layout)


def masked_attention(
    q: Float[Array, "B N T H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B N T H"]:
    """Softmax attention in float32 with grouped kv heads, which are not repeated. Scores are scaled by H ** -0.5."""
    # Scaling the queries takes H multiplications per query; scaling the scores would take one per pair.
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    grouped = scaled.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    # Added, not selected: the gradient of a select costs another pass over the scores.
    scores = scores + jnp.where(mask, jnp.float32(0), jnp.float32(MASKED))[:, None, None]
    # Normalised after the values: one pass less over the scores than softmax, forwards and backwards.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(q.dtype).reshape(q.shape)


def reference_attention(
    q: Queries, k: KV, v: KV, layout: TokenLayout, attention_range: Range, window: Window = "ordinal"
) -> Queries:
    """Dense or simulated Hollow Attention of a packed batch."""
    return _masked_block(q, k, v, visible(layout.slots, layout.slots, attention_range, window), attention_range)


def packed_attention(
    q: Queries, k: KV, v: KV, layout: TokenLayout, attention_range: Range, window: Window = "ordinal", block: int | None = None
) -> Queries:
    """Dense or Hollow Attention, each block of queries compiled separately; `block` is the number of visual ones in each.

    A visual query of slot i sees no visual slots outside (i - R, i]. This holds for the position window too, whose distances are
    never smaller than those of ordinals.
    """
    num_text, num_visual, leading = layout.bucket.text, layout.bucket.visual, layout.slots_before_visual
    reach = num_visual if attention_range is None else attention_range - 1
    least = (DENSE_BLOCK if attention_range is None else HOLLOW_BLOCK) // (1 if num_visual > DENSE_BLOCK else 2)
    block = block or max(least, num_visual // MAX_BLOCKS)
    total, outputs = num_text + num_visual, [packed_text_attention(q, k, v, layout)]
    for start in range(num_text, total, block):
        stop = min(start + block, total)
        band = [] if attention_range == TEXT else [(max(num_text, start - reach), stop)]
        outputs.append(_attend_block(q, k, v, layout.slots, (start, stop), [(0, leading), *band], attention_range, window))
    return jnp.concatenate(outputs, axis=2)


def packed_text_attention(q: TextQueries, k: KV, v: KV, layout: TokenLayout) -> Float[Array, "B N text H"]:
    """The rows of `packed_attention` in text slots, from the queries of these slots, which come first in `q`.

    A text query sees no text in later slots.
    """
    num_text, total, outputs = layout.bucket.text, layout.bucket.slots, []
    # The questions of a row may be as long as its image, so text is computed in blocks, too.
    text_block = max(DENSE_BLOCK, num_text // MAX_BLOCKS)
    for start in range(0, num_text, text_block):
        stop = min(start + text_block, num_text)
        outputs.append(_attend_block(q, k, v, layout.slots, (start, stop), [(0, stop), (num_text, total)], None, "ordinal"))
    return jnp.concatenate(outputs, axis=2)


def _attend_block(
    q: TextQueries,
    k: KV,
    v: KV,
    slots: Slots,
    queries: tuple[int, int],
    key_spans: list[tuple[int, int]],
    attention_range: Range,
    window: Window,
) -> Float[Array, "B N block H"]:
    """The queries of one span of slots, which see keys in `key_spans` only."""

    def keys(x: Array, axis: int) -> Array:
        return jnp.concatenate([jax.lax.slice_in_dim(x, *span, axis=axis) for span in key_spans], axis=axis)

    query, key = slots.cut(lambda x: x[:, slice(*queries)]), slots.cut(partial(keys, axis=1))
    mask = visible(query, key, attention_range, window)
    return _masked_block(q[:, :, slice(*queries)], keys(k, 2), keys(v, 2), mask, attention_range)


def _masked_block(q: Array, k: Array, v: Array, mask: Bool[Array, "B T S"], attention_range: Range) -> Array:
    """`masked_attention`, and zeros for queries without keys, which exist in attention to text only."""
    if attention_range != TEXT:
        return masked_attention(q, k, v, mask)
    if not mask.shape[2]:
        return jnp.zeros_like(q)
    return jnp.where(mask.any(axis=2)[:, None, :, None], masked_attention(q, k, v, mask), jnp.zeros((), q.dtype))


def chunked_attention(
    q: Queries, k: KV, v: KV, layout: TokenLayout, attention_range: Range, window: Window = "ordinal", block: int = DENSE_BLOCK
) -> Queries:
    """Dense or Hollow Attention for long prompts: only the scores of one block of queries are in memory at a time.

    A compiler may compute the blocks of `packed_attention` side by side, and then all scores of dense attention are in memory.
    Here blocks are the steps of loops. All steps of a loop have equal shapes. In dense attention there is one loop per span of
    queries, and its steps meet the keys up to the end of the span: with `DENSE_SPANS` spans, 1/16 more scores than needed.
    """
    num_text, num_visual, leading = layout.bucket.text, layout.bucket.visual, layout.slots_before_visual
    if attention_range is None:
        edges = [num_text + num_visual * i // DENSE_SPANS for i in range(DENSE_SPANS + 1)]
        loops = [(start, stop, leading, stop - num_text) for start, stop in pairwise(edges)]
    else:
        width = 0 if attention_range == TEXT else min(num_visual, block + attention_range - 1)
        loops = [(num_text, layout.bucket.slots, leading, width)]
    output = chunked_text_attention(q, k, v, layout, block)
    for loop in loops:
        output = _attend_loop(output, q, k, v, layout, loop, block, attention_range, window)
    return output


def chunked_text_attention(q: TextQueries, k: KV, v: KV, layout: TokenLayout, block: int = DENSE_BLOCK) -> TextQueries:
    """The rows of `chunked_attention` in text slots, from the queries of these slots, which come first in `q`; others are 0."""
    num_text, num_visual = layout.bucket.size
    return _attend_loop(jnp.zeros_like(q), q, k, v, layout, (0, num_text, num_text, num_visual), block, None, "ordinal")


def _attend_loop(
    output: TextQueries,
    q: TextQueries,
    k: KV,
    v: KV,
    layout: TokenLayout,
    loop: tuple[int, int, int, int],
    block: int,
    attention_range: Range,
    window: Window,
) -> TextQueries:
    """`output` with the rows of the slots `start` to `stop`. They meet the first `num_keys` keys and `width` visual ones."""
    start, stop, num_keys, width = loop
    if start == stop:
        return output
    num_text, slots = layout.bucket.text, layout.slots
    reach = layout.bucket.visual if attention_range is None else attention_range - 1
    starts, size = equal_parts(stop - start, block)

    def attend_block(output: Array, start: Array) -> tuple[Array, None]:
        first = jnp.clip(start - reach, num_text, max(stop, num_text + width) - width)

        def queries(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        def keys(x: Array, axis: int) -> Array:
            text = jax.lax.slice_in_dim(x, 0, num_keys, axis=axis)
            return jnp.concatenate([text, jax.lax.dynamic_slice_in_dim(x, first, width, axis)], axis=axis)

        query, key = (slots.cut(partial(cut, axis=1)) for cut in (queries, keys))
        mask = visible(query, key, attention_range, window)
        part = _masked_block(queries(q, 2), keys(k, 2), keys(v, 2), mask, attention_range)
        return jax.lax.dynamic_update_slice_in_dim(output, part, start, axis=2), None

    return jax.lax.scan(attend_block, output, jnp.asarray(starts + np.int32(start)))[0]


def equal_parts(length: int, most: int) -> tuple[np.ndarray, int]:
    """Starts int32 and size of the fewest equal parts of at most `most` items that cover `length` items.

    The last part overlaps the one before instead of being padded, so some items are computed twice, to the same values.
    """
    count = -(-length // most)
    size = -(-length // count)
    return np.minimum(np.arange(count, dtype=np.int32) * size, length - size).astype(np.int32), size
