"""Attention in a vision tower: each patch attends to those of its image that have its group number.

    group           The image's patches have one number and its padding another; or each window of the image has a number.
    masked_attention (rlens_jax.ops.attention), with the mask "same group", is the plain reference. It forms all scores of an
                    image, and small images take it. At 65,536 patches and 16 heads the scores are 275 GB.
    attend_in_chunks
                    forms those of one block of queries of one image at a time. With windows a block meets the keys around it.
    splash_tower_attention
                    is JAX's Pallas splash kernel for TPUs, which forms them on the chip only. Groups are its segments.
    cudnn_tower_attention
                    is cuDNN's for NVIDIA GPUs, likewise, for images without windows. Sequence lengths say where the image ends.
                    Windows would be segments there, which cuDNN takes from Hopper on; they go in chunks, which are small.

The platform that a program is compiled for decides between the last three, so towers need not know of it. A batch pads its images
to one size, so they are a leading axis and not more segments of one sequence: no block of one image meets a block of another.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from rlens_jax.ops.attention import equal_parts, masked_attention
from rlens_jax.ops.attention_gpu import cudnn_first_keys, refusal
from rlens_jax.ops.attention_tpu import block_kernel, block_size
from rlens_jax.sharding.model_axis import split_heads

Heads = Float[Array, "I N J H"]
Groups = Int[Array, "I J"]
"""A number from 0 on for each patch."""

WHOLE = 512
"""Max patches of an image whose scores are all formed at once."""

CPU_QUERIES, QUERIES = 128, 1024
"""Queries per block of `attend_in_chunks` on a CPU and elsewhere. On 2 cores, 16 heads of 80 and 4096 patches took 2.8 s of CPU
time in blocks of 128, 3.3 to 3.6 s in smaller and larger ones: scores of 128 queries stay in the cache. A GPU needs larger
products (our decision, not timed on one)."""

QUERY_BLOCK, KEY_BLOCK = 2048, 512
"""Patches per block of the splash kernel. For each block of queries it fetches all keys and values again: at 65,536 patches and 4
heads 4.3 GB a layer, and with blocks of 512 queries 17 GB. Larger ones would not fit in the chip's memory in float32."""

NEAR_QUERY_BLOCK, NEAR_KEY_BLOCK = 512, 256
"""The same for windows, whose blocks meet few keys."""

_NOBODY = -1
"""The group of the kernel's padding."""


def attend_groups(q: Heads, k: Heads, v: Heads, group: Groups, most: int | None = None) -> Heads:
    """Attention of every patch to the patches of its image with the same group number.

    It has no gradient above `WHOLE` patches.

    Args:
        q, k, v: float32 or bfloat16, the heads of the whole model or of one shard. Padding may hold any finite numbers.
        group: the numbers.
        most: max patches in a group, if the patches stand group by group; the last group, of padding, may have more. None if
            an image's patches are one group, and padding follows them.

    Returns:
        Outputs in the dtype of `q`; those of padding are finite and have no meaning.
    """
    if q.shape[2] <= (WHOLE if most is None else 2 * most):
        return masked_attention(q, k, v, group[:, :, None] == group[:, None])
    ways: dict[str, Any] = {"cpu": partial(attend_in_chunks, most=most, queries=CPU_QUERIES)}
    ways["tpu"] = partial(splash_tower_attention, most=most)
    if most is None and refusal(q.dtype, q.shape[-1]) is None:
        ways["cuda"] = cudnn_tower_attention
    return jax.lax.platform_dependent(q, k, v, group, **ways, default=partial(attend_in_chunks, most=most, queries=QUERIES))


def attend_in_chunks(q: Heads, k: Heads, v: Heads, group: Groups, most: int | None, queries: int) -> Heads:
    """As `attend_groups`; only the scores of one block of at most `queries` queries of one image are in memory at a time."""
    patches = q.shape[2]
    # With windows of `most` patches, blocks of twice as many form the fewest scores per step's cost.
    starts, size = equal_parts(patches, queries if most is None else min(queries, 2 * most))
    width = patches if most is None else min(patches, size + 2 * (most - 1))

    def attend_image(image: tuple[Array, Array, Array, Array]) -> Float[Array, "N J H"]:
        q, k, v, group = (x[None] for x in image)

        def attend_block(output: Heads, start: Array) -> tuple[Heads, None]:
            first = 0 if most is None else jnp.clip(start - (most - 1), 0, patches - width)
            block, own = (jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x, axis in ((q, 2), (group, 1)))
            keys, values, others = (
                jax.lax.dynamic_slice_in_dim(x, first, width, axis) for x, axis in ((k, 2), (v, 2), (group, 1))
            )
            part = masked_attention(block, keys, values, own[:, :, None] == others[:, None])
            return jax.lax.dynamic_update_slice_in_dim(output, part, start, axis=2), None

        return jax.lax.scan(attend_block, jnp.zeros_like(q), jnp.asarray(starts))[0][0]

    return jax.lax.map(attend_image, (q, k, v, group))


def cudnn_tower_attention(q: Heads, k: Heads, v: Heads, group: Groups) -> Heads:
    """As `attend_groups` without windows, by cuDNN, or its pieces in plain XLA (`rlens_jax.ops.attention_gpu`).

    In a program that XLA cuts along `model`, each shard computes its own heads, or all of them if they do not divide.
    """

    def attend(q: Heads, k: Heads, v: Heads, group: Groups) -> Heads:
        return cudnn_first_keys(q, k, v, (group == group[:, :1]).sum(axis=1, dtype=jnp.int32))

    return split_heads(attend, q.shape[1])(q, k, v, group)


def splash_tower_attention(
    q: Heads, k: Heads, v: Heads, group: Groups, most: int | None, block: int | None = None, interpret: bool = False
) -> Heads:
    """As `attend_groups`, by the splash kernel, one image after another.

    In a program that XLA cuts along `model`, each shard computes its own heads, or all of them if they do not divide.

    Head sizes 64, 72, 80 and 128 go in as they are. On a TPU a row takes a multiple of 128 lanes anyway, and the matrix unit is
    128 deep: padding the heads in the program would save nothing and cost a copy of q, k and v.

    Args:
        block: max patches per block of queries and of keys, a multiple of 128; by default `QUERY_BLOCK` and so on.
        interpret: run the kernel in Pallas' interpreter, on any platform.
    """
    patches = q.shape[2]
    query_block = block_size(patches, None, block or (QUERY_BLOCK if most is None else NEAR_QUERY_BLOCK))
    key_block = block_size(patches, None, block or (KEY_BLOCK if most is None else NEAR_KEY_BLOCK))

    def attend_image(image: tuple[Array, Array, Array, Array]) -> Float[Array, "N J H"]:
        *heads, group = image
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, -patches % size), (0, 0)))
            for x, size in zip(heads, (query_block, key_block, key_block), strict=True)
        )
        # Padded queries join the group of the last patch, so that they see keys and their outputs are finite.
        queries, keys = (jnp.pad(group, (0, -patches % size), mode="edge") for size in (query_block, key_block))
        visited = _visited(queries, keys, query_block, key_block, most)
        kernel = block_kernel(visited, query_block, key_block, None, interpret=interpret, save_residuals=False)
        segments = splash.SegmentIds(q=queries, kv=jnp.where(jnp.arange(keys.shape[0]) < patches, keys, _NOBODY))
        attended: Any = kernel(q, k, v, segments)
        return attended[:, :patches]

    def attend(q: Heads, k: Heads, v: Heads, group: Groups) -> Heads:
        scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        # The kernel's products follow this setting: a TPU rounds float32 factors to bfloat16 by default. The dry run finds the
        # kernel by the scope.
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"), jax.named_scope(SCOPE):
            return jax.lax.map(attend_image, (scaled, k, v, group))

    return split_heads(attend, q.shape[1])(q, k, v, group)


SCOPE = "tower_attention"


def _visited(
    queries: Int[Array, " queries"], keys: Int[Array, " keys"], query_block: int, key_block: int, most: int | None
) -> MaskInfo:
    """The kernel's block map: each block of queries visits the blocks of keys with numbers in its range of group numbers.

    It follows from the numbers, so padding costs no arithmetic. Blocks that lie too far off for a group of `most` patches are not
    even steps of the grid. Every block of queries meets its own patches; without any keys its output would stay unwritten.
    """
    of_queries, of_keys = queries.reshape(-1, query_block), keys.reshape(-1, key_block)
    first, count = np.zeros(len(of_queries), np.int32), len(of_keys)
    if most is not None:
        begin = np.arange(len(of_queries)) * query_block
        first = np.minimum(np.maximum(begin - (most - 1), 0) // key_block, count - 1)
        end = np.minimum(-(-(begin + query_block + most - 1) // key_block), count)
        count = int((end - first).max())
        first = np.minimum(first, len(of_keys) - count)
    block = jnp.asarray(first[:, None] + np.arange(count), jnp.int32)
    low, high = of_keys.min(axis=1)[block], of_keys.max(axis=1)[block]
    visited = (low <= of_queries.max(axis=1)[:, None]) & (of_queries.min(axis=1)[:, None] <= high)
    # A step without work names a block that is visited, which is not fetched a second time.
    named = jnp.clip(
        block,
        jnp.where(visited, block, len(of_keys)).min(axis=1, keepdims=True),
        jnp.where(visited, block, 0).max(axis=1, keepdims=True),
    )
    return MaskInfo(named[None], None, visited.astype(jnp.int32)[None], None, None)
