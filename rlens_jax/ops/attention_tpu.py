"""Attention on a TPU: dense and Hollow Attention through JAX's Pallas splash kernel (a sparse flash attention).

Packed slots are two runs, text and visual, each in sequence order with its padding at the end (rlens_jax/layout.py). What
a query sees splits accordingly into two calls of the same kernel, merged by log-sum-exp (method.md, "Static and exact for
ragged samples"):

    its own run     a static band over slots: 0 <= i - j < R among visual tokens, causal (an endless band) among text and in
                    dense layers. The kernel is handed the band as a function of two indices, never as a matrix, and a block
                    map, made once, of the few blocks that the band touches.
    the other run   the first c keys, c being how many tokens of that run precede the query in the sequence. That is data,
                    but one number a query: the mask is `slot < c`, again computed in the kernel, and the block map is
                    computed on the device: blocks that no query of a block needs are neither fetched nor multiplied.

Neither part forms scores in memory. What a call leaves there, for the G query heads of one kv head at a time, is its output
[G, P, H] and its log-sum-exp, which the kernel stores 128 times over, [G, P, 128] float32. At P = 16384, X = 1024, G = 7 and
H = 128 in bfloat16 the two calls take 176 MB, of which a program compiled for v5e keeps all but 73 MB on chip. Scores of the
text part in plain XLA would be 470 MB, written and read several times, or a scan over blocks of queries.

Padding is a segment of its own and meets padding only; the counts of the other run never reach it.

Axis letters: B batch, N query heads, K kv heads, G = N / K, T = X + P packed slots, X text slots, P visual slots, L slots of
a run, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)
from jaxtyping import Array, Float, Int

from rlens_jax.layout import Bucket, TokenLayout, Window
from rlens_jax.ops.attention import attention_in_turn, packed_attention

Kernel = Literal["packed", "splash"]
"""What computes the attention of a prefill: the path of plain XLA, or the TPU's Pallas kernel."""

LANES = 128
"""Blocks are whole rows of a TPU's vector lanes."""

HOLLOW_BLOCK, DENSE_BLOCK = 256, 512
"""Slots of a block (our decision; no TPU was at hand to time it). A step of the kernel's grid costs some 0.3 us whatever it
does, about the arithmetic of a 256 x 256 block at H = 128 on v5e, so smaller blocks save little. With R = 256 and P = 1664 a
head takes 36 steps and 0.59 M scores in blocks of 128, 13 steps and 0.85 M in 256, 7 steps and 1.84 M in 512. Longer ranges
and dense attention take the larger blocks."""


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: TokenLayout,
    attention_range: int | None,
    window: Window = "ordinal",
    *,
    kernel: Kernel,
    in_turn: bool = False,
) -> Float[Array, "B N T H"]:
    """Attention of a packed batch by the kernel that the caller names, for the platform its program is compiled for.

    For long prompts plain XLA is told to compute blocks `in_turn`; the splash kernel has no scores in memory in any case.

    Same result either way; `splash` runs on a TPU (or, in tests, under `pltpu.force_tpu_interpret_mode`) and has no gradient.
    """
    plain = attention_in_turn if in_turn else packed_attention
    attention = plain if kernel == "packed" else splash_attention
    return attention(q, k, v, layout, attention_range, window)


def splash_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: TokenLayout,
    attention_range: int | None,
    window: Window = "ordinal",
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Dense (`attention_range` None) or Hollow Attention of a packed batch; same result as `reference_attention`.

    Samples go through the kernel one after another, each with its own counts and its own block maps, and so do the kv heads
    of a sample, each with the query heads that share it: temporaries are those of one group. All arrays are local:
    inside a `shard_map` (with `check_vma=False`: the kernel does not say over which axes its outputs vary) N and K are
    the heads of one shard. The window of positions is a data-dependent part of the band of ordinals, and is exact too.

    Args:
        q: rotated queries, float32 or bfloat16; scores are scaled by H ** -0.5.
        k: rotated keys; kv heads are shared by N / K query heads each and never repeated.
        v: values.
        layout: the packing.
        attention_range: R, or None for dense attention.
        window: whether distance is counted in visual ordinals or in absolute positions.
        block: most slots of a block, a multiple of 128; by the range if not given.
        interpret: run the kernel in Pallas' interpreter, on any platform.

    Returns:
        Outputs in the dtype of `q`; rows of empty slots are finite numbers without meaning.
    """
    bucket = layout.bucket
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    if attention_range is not None and attention_range >= bucket.visual and window == "ordinal":
        attention_range = None
    text, visual = layout.text.position, layout.visual.position
    reach = _reach(visual, attention_range) if attention_range is not None and window == "position" else None
    text_order = _Order(jnp.asarray(layout.num_text), _preceding(text, visual), None)
    visual_order = _Order(jnp.asarray(layout.num_visual), _preceding(visual, text), reach)

    def attend_group(
        q: Float[Array, "G T H"],
        k: Float[Array, "1 T H"],
        v: Float[Array, "1 T H"],
        text_order: _Order,
        visual_order: _Order,
    ) -> Float[Array, "G T H"]:
        heads = q, k, v
        text = _make_run(heads, slice(bucket.text), text_order, block_size(bucket.text, None, block))
        if not bucket.visual:
            return _attend_run(text, None, None, interpret)[:, : bucket.text]
        size = block_size(bucket.visual, attention_range, block)
        visual = _make_run(heads, slice(bucket.text, None), visual_order, size)
        outputs = [
            _attend_run(text, visual, None, interpret)[:, : bucket.text],
            _attend_run(visual, text, attention_range, interpret)[:, : bucket.visual],
        ]
        return jnp.concatenate(outputs, axis=1)

    def attend_sample(x: tuple[Array, Array, Array, _Order, _Order]) -> Float[Array, "K G T H"]:
        q, k, v, *orders = x
        groups = (q.reshape(k.shape[0], -1, *q.shape[1:]), k[:, None], v[:, None])
        return jax.lax.map(lambda group: attend_group(*group, *orders), groups)

    # The kernel's products follow this setting: float32 factors are rounded to bfloat16 on a TPU otherwise.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        attended = jax.lax.map(attend_sample, (scaled, k, v, text_order, visual_order))
    return attended.reshape(q.shape)


class _Order(NamedTuple):
    """What the tokens of one run know about the sequence; one value a slot, or one a sample."""

    used: Int[Array, "*B"]
    """Slots that are not padding."""
    before: Int[Array, "*B L"]
    """Tokens of the other run that come before each slot's."""
    reach: Int[Array, "*B L"] | None
    """Slots that each one sees back, where that is less than the band (window of positions)."""


class _Run(NamedTuple):
    """One run of one sample, made up to whole blocks."""

    q: Float[Array, "G L H"]
    k: Float[Array, "1 L H"]
    v: Float[Array, "1 L H"]
    segment: Int[Array, " L"]
    """1 for tokens, 0 for padding."""
    before: Int[Array, " L"]
    reach: Int[Array, " L"] | None
    block: int


def _preceding(position: Int[Array, "B L"], other: Int[Array, "B S"]) -> Int[Array, "B L"]:
    """How many tokens of the other run come before each token of this one; empty slots say nothing.

    Counted, not taken from the positions themselves: where tokens have been pruned, positions have gaps.
    """
    return jax.vmap(jnp.searchsorted)(other, position).astype(jnp.int32)


def _reach(position: Int[Array, "B P"], attention_range: int) -> Int[Array, "B P"]:
    """How many slots back, itself not counted, are fewer than `attention_range` positions away."""
    first = jax.vmap(jnp.searchsorted)(position, position - (attention_range - 1)).astype(jnp.int32)
    reach = jax.lax.broadcasted_iota(jnp.int32, position.shape, 1) - first
    return jnp.minimum(reach, attention_range - 1)  # Empty slots are all at one position.


def _make_run(heads: tuple[Array, Array, Array], slots: slice, order: _Order, block: int) -> _Run:
    """The run in `slots` of queries, keys and values [heads, T, H]."""
    q, k, v = (x[:, slots] for x in heads)
    more = -q.shape[1] % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0))) for x in (q, k, v))
    segment = (jnp.arange(q.shape[1], dtype=jnp.int32) < order.used).astype(jnp.int32)
    before = jnp.pad(order.before, (0, more)) * segment
    reach = None if order.reach is None else jnp.pad(order.reach, (0, more))
    return _Run(q, k, v, segment, before, reach, block)


def _attend_run(run: _Run, other: _Run | None, attention_range: int | None, interpret: bool) -> Float[Array, "G L H"]:
    """Attention of one run's queries to its own band and to what precedes them of the other run."""
    heads, length, _ = run.q.shape
    kernel = _band_kernel(heads, length, attention_range, run.block, interpret)
    if run.reach is not None and attention_range is not None:
        kernel = _narrowed(kernel, run.reach, attention_range)
    segments = splash_attention_kernel.SegmentIds(q=run.segment, kv=run.segment)
    own, (own_total,) = kernel(run.q, run.k, run.v, segments)
    if other is None:
        return own
    kernel = _prefix_kernel(run.before, other.k.shape[1], run.block, other.block, interpret)
    across, (across_total,) = kernel(run.q, other.k, other.v)
    # The softmax over both parts: each part's outputs, weighted by its share of the summed exponentials.
    share = jax.nn.sigmoid(across_total - own_total)[:, :, None]
    # A query before which the other run has no token has a share of 0 in a mean over arbitrary slots.
    across = jnp.where((run.before > 0)[None, :, None], across.astype(jnp.float32), jnp.float32(0))
    return (own.astype(jnp.float32) * (1 - share) + across * share).astype(run.q.dtype)


@functools.lru_cache
def _band_kernel(
    heads: int, length: int, attention_range: int | None, block: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel of a run with itself. Its block map takes a while for long runs, so each is made once, as NumPy arrays."""
    back = None if attention_range is None else attention_range - 1
    mask = splash_attention_mask.LocalMask((length, length), window_size=(back, 0), offset=0)
    # The library makes JAX arrays, which would belong to the trace that asks first.
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(block_q=block, block_kv=block),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _narrowed(
    kernel: splash_attention_kernel.SplashAttentionKernel, reach: Int[Array, " L"], attention_range: int
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel of a band of which each query sees only `reach` slots back.

    The kernel's mask function is told one number a query, so slot and reach share it.
    """
    length = reach.shape[0]
    bits = (attention_range - 1).bit_length()
    if length << bits > 2**31:
        raise ValueError(f"{length} visual slots and an attention range of {attention_range} exceed 31 bits")
    query = (jnp.arange(length, dtype=jnp.int32) << bits) | reach
    info = kernel.fwd_mask_info._replace(q_sequence=query)  # type: ignore[arg-type]  # may be data
    return splash_attention_kernel.SplashAttentionKernel(
        info, None, None, **(kernel.kwargs | {"mask_function": _within(bits)})
    )


@functools.lru_cache
def _within(bits: int) -> Callable[[Array, Array], Array]:
    """The mask of a narrowed band; one object for each number of bits, since the kernel is compiled for the object."""

    def within(query: Array, slot: Array) -> Array:
        distance = (query >> bits) - slot
        return (distance >= 0) & (distance <= (query & ((1 << bits) - 1)))

    return within


def _before(query: Array, slot: Array) -> Array:
    """The mask of the first slots of a run; a query's number is how many it sees."""
    return slot < query


def _prefix_kernel(
    seen: Int[Array, " L"], num_keys: int, block: int, key_block: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel of queries that see the first `seen` of `num_keys` keys, with a block map for just these numbers.

    A block of queries visits the first block of keys in any case, since the kernel writes nothing sensible otherwise.
    """
    last = jnp.maximum(seen.reshape(-1, block).max(axis=1) - 1, 0) // key_block
    blocks = jnp.arange(num_keys // key_block, dtype=jnp.int32)
    visited = blocks[None, None, :] <= last[None, :, None]
    info = splash_attention_mask_info.MaskInfo(
        # A step without work names the last block again, which is not fetched a second time.
        data_next=jnp.minimum(blocks[None, None, :], last[None, :, None]),
        mask_next=None,
        block_mask=visited.astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=seen,  # type: ignore[arg-type]  # may be data
    )
    return splash_attention_kernel.SplashAttentionKernel(
        info,
        None,
        None,
        block_sizes=splash_attention_kernel.BlockSizes(block_q=block, block_kv=key_block),
        is_mqa=False,
        save_residuals=True,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_before,
        interpret=interpret,
    )


def block_size(length: int, attention_range: int | None, most: int | None = None) -> int:
    """Slots of a block for a run: as few blocks as `most` slots allow (by the range if not given), and as small."""
    hollow = attention_range is not None and attention_range <= HOLLOW_BLOCK
    blocks = -(-length // (most or (HOLLOW_BLOCK if hollow else DENSE_BLOCK)))
    return -(-length // (blocks * LANES)) * LANES


class Blocks(NamedTuple):
    """Blocks of the visual -> visual map of one head."""

    visited: int
    causal: int
    """What dense attention visits in blocks of the same size."""
    size: int
    """Queries, and keys, of a block."""


def visited_blocks(num_visual: int, attention_range: int | None, block: int | None = None) -> Blocks:
    """How much of the visual run's scores the kernel computes: its own block map, counted.

    Args:
        num_visual: P, slots of the bucket.
        attention_range: R, or None for dense attention.
        block: most slots of a block, as in `splash_attention`.
    """
    if not num_visual:
        return Blocks(0, 0, LANES)
    if attention_range is not None and attention_range >= num_visual:
        attention_range = None
    block = block_size(num_visual, attention_range, block)
    length = -(-num_visual // block) * block
    visited, causal = (
        np.count_nonzero(np.asarray(_band_kernel(1, length, band, block, False).fwd_mask_info.block_mask))
        for band in (attention_range, None)
    )
    return Blocks(int(visited), int(causal), block)


def kernel_flops(bucket: Bucket, attention_range: int | None, heads: int, head_dim: int) -> int:
    """FLOPs (2 a multiply-add) of one sample's `splash_attention`, which XLA's cost analysis cannot see.

    Blocks between text and visual tokens depend on the sample and are all counted: a bound from above.
    """
    text, visual = visited_blocks(bucket.text, None), visited_blocks(bucket.visual, attention_range)
    rows = [
        -(-slots // run.size) * run.size
        for slots, run in zip((bucket.text, bucket.visual), (text, visual), strict=True)
    ]
    pairs = text.visited * text.size**2 + visual.visited * visual.size**2 + 2 * rows[0] * rows[1]
    return 4 * pairs * heads * head_dim
