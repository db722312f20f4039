"""Attention on a TPU: dense and Hollow Attention by JAX's Pallas splash kernel, a sparse flash attention.

Packed slots are two runs, text and visual, each in sequence order with its padding at the end (rlens_jax/layout.py). The keys
that a query sees lie in both runs. Calls of the kernel handle them, and their outputs are merged by log-sum-exp
(docs/method.md):

    same run        A static band over slots: 0 <= i - j < R between visual tokens, causal (an endless band) between text tokens
                    and in dense layers. The kernel computes the band from two indices; no mask matrix exists. A static map
                    lists the few blocks that the band touches.
    other run       The first n keys, where n counts the tokens of the other run that precede the query in the sequence. This
                    count is data, one number per query. The kernel computes the mask as `slot < n`. The block map is computed
                    on the device; blocks that no query needs are neither fetched nor multiplied.
    trunk           If rows may have several branches: the same for the text of a branch and the text of its trunk. The trunk and
                    each branch are segments of the text run, so the first call keeps them apart.

No call holds scores in HBM. For the G query heads of one kv head, a call writes its output [G, P, H] and its log-sum-exp,
which the kernel stores 128 times, [G, P, 128] float32. At P = 16384, X = 1024, G = 7 and H = 128 in bfloat16 two calls take
176 MB, of which a program compiled for v5e keeps all but 73 MB on chip. The scores of the text part in plain XLA would take
470 MB, written and read several times, or a scan over blocks of queries.

Padding has its own segment and meets padding only. The counts of the other run never reach it.

Additional axis word: `run`, the slots of one run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from rlens_jax.layout import KV, PADDING_POSITION, Bucket, Queries, Range, TokenLayout, Window
from rlens_jax.plans import TEXT

LANES = 128
"""Vector lanes of a TPU. The number of slots in a block is a multiple of it."""

HOLLOW_BLOCK, DENSE_BLOCK = 256, 512
"""Slots per block (our decision, not timed on a TPU). A step of the kernel's grid has a fixed cost of about 0.3 us. This equals
the arithmetic of a 256 x 256 block at H = 128 on v5e, so smaller blocks save little. With R = 256 and P = 1664 a head takes
36 steps and 0.59 M scores in blocks of 128, 13 steps and 0.85 M in blocks of 256, 7 steps and 1.84 M in blocks of 512. Longer
ranges and dense attention use the larger blocks."""


def splash_attention(
    q: Queries,
    k: KV,
    v: KV,
    layout: TokenLayout,
    attention_range: Range,
    window: Window = "ordinal",
    block: int | None = None,
    interpret: bool = False,
) -> Queries:
    """Dense or Hollow Attention of a packed batch in float32 or bfloat16; same result as `reference_attention`.

    Samples run one after another, and so do the kv heads of a sample, each with the G query heads that share it. Temporaries
    are therefore those of one group. All arrays are local: inside a `shard_map`, N and K are the heads of one shard. Use
    `check_vma=False` there, because the kernel does not declare over which axes its outputs vary.

    Args:
        block: max slots per block, a multiple of 128; chosen by the range by default.
        interpret: run the kernel in Pallas' interpreter, on any platform.

    Returns:
        Outputs in the dtype of `q`; rows of empty slots are finite and have no meaning.
    """
    bucket = layout.bucket
    if attention_range is not None and attention_range >= bucket.visual and window == "ordinal":
        attention_range = None

    def attend_group(heads: Heads, orders: tuple[_Order, _Order]) -> Float[Array, "G T H"]:
        text = _make_run(heads, slice(bucket.text), orders[0], block_size(bucket.text, None, block))
        prefixes = [] if text.trunk is None else [(text, text.trunk)]
        if not bucket.visual:
            return _attend_run(text, prefixes, None, interpret)[:, : bucket.text]
        size = block_size(bucket.visual, attention_range, block)
        visual = _make_run(heads, slice(bucket.text, None), orders[1], size)
        of_text = _attend_run(text, [(visual, text.before), *prefixes], None, interpret)[:, : bucket.text]
        if attention_range == TEXT:
            of_visual, _ = _attend_prefix(visual, text, visual.before, interpret)
            of_visual = of_visual.astype(q.dtype)
        else:
            of_visual = _attend_run(visual, [(text, visual.before)], attention_range, interpret)
        return jnp.concatenate([of_text, of_visual[:, : bucket.visual]], axis=1)

    orders = _orders(layout, attention_range if window == "position" and attention_range != TEXT else None)
    return _map_groups(attend_group, q, k, v, orders)


def splash_text_attention(
    q: Float[Array, "B N X H"], k: KV, v: KV, layout: TokenLayout, block: int | None = None, interpret: bool = False
) -> Float[Array, "B N X H"]:
    """The rows of dense `splash_attention` in text slots alone, from the queries of these slots."""
    bucket = layout.bucket

    def attend_group(heads: Heads, orders: tuple[_Order, _Order]) -> Float[Array, "G X H"]:
        q, k, v = heads
        size = block_size(bucket.text, None, block)
        text = _make_run((q, k[:, : bucket.text], v[:, : bucket.text]), slice(None), orders[0], size)
        prefixes = [] if text.trunk is None else [(text, text.trunk)]
        if bucket.visual:
            keys, values = k[:, bucket.text :], v[:, bucket.text :]
            # A run needs queries; nothing reads these.
            visual = _make_run((keys, keys, values), slice(None), orders[1], block_size(bucket.visual, None, block))
            prefixes.insert(0, (visual, text.before))
        return _attend_run(text, prefixes, None, interpret)[:, : bucket.text]

    return _map_groups(attend_group, q, k, v, _orders(layout, None))


def _map_groups(
    attend_group: Callable[["Heads", tuple["_Order", "_Order"]], Array], q: Array, k: Array, v: Array, orders: Any
) -> Array:
    """`attend_group` over all samples and kv heads, with the scaled queries that share a head; the shape is that of `q`."""
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)

    def attend_sample(sample: tuple[Array, Array, Array, Any]) -> Float[Array, "K G T H"]:
        q, k, v, orders = sample
        groups = (q.reshape(k.shape[0], -1, *q.shape[1:]), k[:, None], v[:, None])
        return jax.lax.map(lambda heads: attend_group(heads, orders), groups)

    # The kernel's products follow this setting: a TPU rounds float32 factors to bfloat16 by default.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.lax.map(attend_sample, (scaled, k, v, orders)).reshape(q.shape)


Heads = tuple[Float[Array, "G slots H"], Float[Array, "1 T H"], Float[Array, "1 T H"]]
"""Queries of one group of heads, with its keys and values."""


class _Order(NamedTuple):
    """How the tokens of one run lie in the sequence: one value per slot."""

    segment: Int[Array, "*B run"]
    """0 for padding. Tokens of different segments are on different branches, or one is in the trunk."""
    before: Int[Array, "*B run"]
    """Number of tokens of the other run that precede each token."""
    trunk: Int[Array, "*B run"] | None
    """Number of text tokens in the trunk, if this is the text of a branch; None where rows have one branch."""
    reach: Int[Array, "*B run"] | None
    """Number of slots that each token sees back, if less than the band (position window)."""


class _Run(NamedTuple):
    """One run of one sample, padded to whole blocks."""

    q: Float[Array, "G run H"]
    k: Float[Array, "1 run H"]
    v: Float[Array, "1 run H"]
    segment: Int[Array, " run"]
    before: Int[Array, " run"]
    trunk: Int[Array, " run"] | None
    reach: Int[Array, " run"] | None
    block: int


def _orders(layout: TokenLayout, position_range: Range) -> tuple[_Order, _Order]:
    """The orders of the text and the visual run; `position_range` is R of the position window."""
    text, visual = layout.text, layout.visual
    in_trunk = text.branch == 0  # and empty slots
    used_text, used_visual = text.position < PADDING_POSITION, visual.position < PADDING_POSITION
    segment, trunk = used_text.astype(jnp.int32), None
    if layout.max_branches > 1:
        segment = segment * (text.branch + 1)
        trunk = jnp.where(in_trunk, 0, (in_trunk & used_text).sum(axis=1, dtype=jnp.int32, keepdims=True))
    reach = None if position_range is None else _reach(visual.position, position_range)
    return (
        _Order(segment, _num_before(text.position, visual.position), trunk, None),
        _Order(used_visual.astype(jnp.int32), _num_before(visual.position, text.position), None, reach),
    )


def _num_before(position: Int[Array, "B run"], other: Int[Array, "B other"]) -> Int[Array, "B run"]:
    """Number of tokens of the other run that precede each token of this one; arbitrary for empty slots.

    The tokens are counted, because positions have gaps after pruning. Positions are sorted up to the first branch; the text of
    branches follows all visual tokens, so it is never among those counted.
    """
    return jax.vmap(jnp.searchsorted)(other, position).astype(jnp.int32)


def _reach(position: Int[Array, "B P"], attention_range: int) -> Int[Array, "B P"]:
    """Number of earlier slots that are fewer than `attention_range` positions away."""
    first = jax.vmap(jnp.searchsorted)(position, position - (attention_range - 1)).astype(jnp.int32)
    reach = jax.lax.broadcasted_iota(jnp.int32, position.shape, 1) - first
    return jnp.minimum(reach, attention_range - 1)  # All empty slots have the same position.


def _make_run(heads: tuple[Array, Array, Array], slots: slice, order: _Order, block: int) -> _Run:
    """The run in `slots` of queries, keys and values [heads, T, H]."""
    q, k, v = (x[:, slots] for x in heads)
    padding = -q.shape[1] % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    segment, before, trunk, reach = jax.tree.map(lambda x: jnp.pad(x, (0, padding)), order)
    return _Run(q, k, v, segment, jnp.where(segment > 0, before, 0), trunk, reach, block)


def _attend_run(
    run: _Run, prefixes: Sequence[tuple[_Run, Int[Array, " run"]]], attention_range: Range, interpret: bool
) -> Float[Array, "G run H"]:
    """Attention of one run's queries to their band, and to the first keys of other runs: how many, by query."""
    heads, length, _ = run.q.shape
    kernel = _band_kernel(heads, length, attention_range, run.block, interpret)
    if run.reach is not None and attention_range is not None:
        kernel = _narrowed(kernel.fwd_mask_info, run, run.reach, attention_range, interpret)
    segments = splash.SegmentIds(q=run.segment, kv=run.segment)
    attended, (total,) = kernel(run.q, run.k, run.v, segments)
    attended = attended.astype(jnp.float32)
    for other, seen in prefixes:
        across, across_total = _attend_prefix(run, other, seen, interpret)
        # The softmax over both parts: each part's outputs, weighted by its share of the summed exponentials.
        share = jax.nn.sigmoid(across_total - total)[:, :, None]
        attended = attended * (1 - share) + across * share
        total = jnp.logaddexp(total, across_total)
    return attended.astype(run.q.dtype)


def _attend_prefix(
    run: _Run, other: _Run, seen: Int[Array, " run"], interpret: bool
) -> tuple[Float[Array, "G run H"], Float[Array, "G run"]]:
    """Attention of one run's queries to the first `seen` keys of another run, in float32, and its log-sum-exp.

    A query that sees none of these keys gets 0; the kernel gives it a mean over arbitrary slots.
    """
    kernel = _prefix_kernel(seen, other.k.shape[1], run.block, other.block, interpret)
    across, (total,) = kernel(run.q, other.k, other.v)
    return jnp.where((seen > 0)[None, :, None], across.astype(jnp.float32), jnp.float32(0)), total


@functools.lru_cache
def _band_kernel(heads: int, length: int, attention_range: Range, block: int, interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel between slots of one run. A long run's block map takes a while, so it is cached, as NumPy arrays."""
    back = None if attention_range is None else attention_range - 1
    mask = masks.LocalMask((length, length), window_size=(back, 0), offset=0)
    # The library makes JAX arrays, which would belong to the trace of the first caller.
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(block_q=block, block_kv=block),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _narrowed(
    band: MaskInfo, run: _Run, reach: Int[Array, " run"], attention_range: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel of a band of which each query sees only `reach` slots back.

    The kernel passes one number per query to its mask function, so slot and reach share it.
    """
    length = reach.shape[0]
    bits = (attention_range - 1).bit_length()
    if length << bits > 2**31:
        raise ValueError(f"{length} visual slots and an attention range of {attention_range} exceed 31 bits")
    query = (jnp.arange(length, dtype=jnp.int32) << bits) | reach
    info = band._replace(q_sequence=query)  # type: ignore[arg-type]  # may be data
    return block_kernel(info, run.block, run.block, _within(bits), interpret=interpret)


@functools.lru_cache
def _within(bits: int) -> Callable[[Array, Array], Array]:
    """The mask of a narrowed band. The kernel is compiled per mask object, so there is one per number of bits."""

    def within(query: Array, slot: Array) -> Array:
        distance = (query >> bits) - slot
        return (distance >= 0) & (distance <= (query & ((1 << bits) - 1)))

    return within


def _in_prefix(query: Array, slot: Array) -> Array:
    """The mask of a run's first slots; a query's number is how many it sees."""
    return slot < query


def _prefix_kernel(
    seen: Int[Array, " run"], num_keys: int, block: int, key_block: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel of queries that see the first `seen` of `num_keys` keys; its block map follows from `seen`.

    Every block of queries visits at least the first block of keys; otherwise the kernel would leave its output unwritten.
    """
    last = jnp.maximum(seen.reshape(-1, block).max(axis=1) - 1, 0) // key_block
    blocks = jnp.arange(num_keys // key_block, dtype=jnp.int32)
    visited = blocks[None, None, :] <= last[None, :, None]
    info = MaskInfo(
        # A step without work names the last block again, which is not fetched a second time.
        data_next=jnp.minimum(blocks[None, None, :], last[None, :, None]),
        mask_next=None,
        block_mask=visited.astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=seen,  # type: ignore[arg-type]  # may be data
    )
    return block_kernel(info, block, key_block, _in_prefix, interpret=interpret)


def block_kernel(
    info: MaskInfo,
    query_block: int,
    key_block: int,
    mask: Callable[[Array, Array], Array] | None,
    *,
    interpret: bool,
    save_residuals: bool = True,
) -> splash.SplashAttentionKernel:
    """The kernel of a block map that may be data, for several heads and without a gradient.

    Args:
        info: its map of blocks, and one number per query if there is a `mask`.
        query_block, key_block: slots per block.
        mask: from the numbers of queries and the slots of keys to whether they meet; None leaves this to the segments.
        interpret: run the kernel in Pallas' interpreter, on any platform.
        save_residuals: whether it also returns the log-sum-exp.
    """
    return splash.SplashAttentionKernel(
        info,
        None,
        None,
        block_sizes=splash.BlockSizes(block_q=query_block, block_kv=key_block),
        is_mqa=False,
        save_residuals=save_residuals,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask,
        interpret=interpret,
    )


def block_size(length: int, attention_range: Range, most: int | None = None) -> int:
    """Slots per block of a run: the smallest size with the fewest blocks of at most `most` slots (default: by the range)."""
    hollow = attention_range is not None and attention_range <= HOLLOW_BLOCK
    blocks = -(-length // (most or (HOLLOW_BLOCK if hollow else DENSE_BLOCK)))
    return -(-length // (blocks * LANES)) * LANES


class Blocks(NamedTuple):
    """Blocks in the visual -> visual map of one head."""

    visited: int
    causal: int
    """Number that dense attention visits with blocks of the same size."""
    size: int
    """Queries, and keys, per block."""


def visited_blocks(num_visual: int, attention_range: Range, block: int | None = None) -> Blocks:
    """Counts the kernel's block map of the visual run, which has `num_visual` slots; `block` as in `splash_attention`."""
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


def kernel_flops(bucket: Bucket, attention_range: Range, heads: int, head_dim: int, max_branches: int = 1) -> int:
    """FLOPs (2 per multiply-add) of `splash_attention` for one row. XLA's cost analysis does not include them.

    This is an upper bound: blocks between text and visual tokens, and between branches and their trunk, depend on the row, and
    all are counted.
    """
    text, visual = visited_blocks(bucket.text, None), visited_blocks(bucket.visual, attention_range)
    rows = [-(-slots // run.size) * run.size for slots, run in zip((bucket.text, bucket.visual), (text, visual), strict=True)]
    pairs = text.visited * text.size**2 + visual.visited * visual.size**2 + 2 * rows[0] * rows[1]
    if max_branches > 1:
        pairs += rows[0] ** 2
    return 4 * pairs * heads * head_dim
