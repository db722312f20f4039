"""Which visual tokens of a packed batch survive: by the attention they receive (FastV), or by merging similar ones (FOLDER).

Samples are ragged, so how many survive is data; the number of slots for them is static. Survivors are given by their ordinals,
ascending. Inside of a mesh, heads are a shard's.

Axis letters: B batch, N query heads, K kv heads, S packed key slots, P visual slots, C slots for survivors, H head dim, D width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.attention import MASKED
from rlens_jax.pruning import Folder, Pruning
from rlens_jax.sharding.model_axis import num_shards, sum_over_shards


def num_survivors(layout: TokenLayout, pruning: Pruning) -> Int[Array, " B"]:
    """How many visual tokens of each sample survive."""
    return _kept_of(layout, pruning)[layout.num_visual]


def _kept_of(layout: TokenLayout, pruning: Pruning) -> Int[Array, " counts"]:
    return jnp.asarray([pruning.kept(n) for n in range(layout.bucket.visual + 1)], jnp.int32)


def attention_received(
    q: Float[Array, "B N H"], k: Float[Array, "B K S H"], sees: Bool[Array, "B S"]
) -> Float[Array, "B S"]:
    """The attention weights of one query a sample, averaged over all heads, in float32 (FastV): one row, never all of them.

    Args:
        q: the rotated query of each sample.
        k: rotated keys.
        sees: which keys it sees.
    """
    batch, num_heads, head_dim = q.shape
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    grouped = scaled.reshape(batch, k.shape[1], num_heads // k.shape[1], head_dim)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, jnp.float32(MASKED)), axis=-1)
    return sum_over_shards(weights.sum(axis=(1, 2))) / jnp.float32(num_heads * num_shards())


def most_attended(
    scores: Float[Array, "B P"], layout: TokenLayout, num_kept: Int[Array, " B"], capacity: int
) -> Int[Array, "B C"]:
    """The ordinals of each sample's `num_kept` visual tokens with the largest scores, in their order; ties: the lower ordinal.

    The `capacity` slots beyond them hold P.
    """
    num_slots = scores.shape[1]
    ordinal = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(ordinal < jnp.asarray(layout.num_visual)[:, None], scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, capacity)
    rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    return jnp.sort(jnp.where(rank < num_kept[:, None], best, num_slots), axis=1)


def merge_similar(
    visual: Float[Array, "B P D"], layout: TokenLayout, pruning: Folder
) -> tuple[Float[Array, "B C D"], Int[Array, "B C"]]:
    """Visual tokens, of which the most similar ones are merged by bipartite matching, in the manner of FOLDER's published code.

    Image by image and in rounds, the tokens that are left are dealt into two sets in turns. Each token of the first finds the
    most similar one (by cosine) of the second; the pairs that are most similar are merged, at most half of the tokens in a
    round, until the image has as few as it should. A merged token is the average of all tokens in it, in the place of the one
    of the second set. Unlike the code we do not scale merged tokens by 1 + log of how many they are, and spare no class token.

    An *image* is a run of visual tokens without text between (our decision: slices or tiles with text between them count one by
    one). After each image, as many are left in all as of one image with all the tokens so far, so the number of survivors
    depends on the number of visual tokens alone; an image so small that nothing is due to it loses all (our decision).

    Args:
        visual: the connector's outputs.
        layout: the packing.
        pruning: the share to be merged away.

    Returns:
        The survivors, and the ordinals of their places; slots beyond a sample's number hold P.
    """
    num_slots = visual.shape[1]
    kept_of, capacity = _kept_of(layout, pruning), pruning.kept(num_slots)
    slot = jnp.arange(num_slots, dtype=jnp.int32)

    def merge(
        sample: tuple[Float[Array, "P D"], Int[Array, " P"], Int[Array, ""]],
    ) -> tuple[Float[Array, "C D"], Int[Array, " C"]]:
        x, position, num_visual = sample
        is_token = slot < num_visual
        image = jnp.cumsum(position != jnp.roll(position, 1) + 1).astype(jnp.int32) - 1

        def per_image(values: Array) -> Array:
            return jax.ops.segment_sum(values, image, num_segments=num_slots)

        tokens = per_image(is_token.astype(jnp.int32))
        up_to = jnp.cumsum(tokens)
        target = kept_of[up_to] - kept_of[up_to - tokens]

        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            left = carry[2]
            return (per_image(left.astype(jnp.int32)) > target).any()

        def merge_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, size, left = carry
            count = per_image(left.astype(jnp.int32))
            before = jnp.cumsum(left.astype(jnp.int32)) - left.astype(jnp.int32)
            first_of_image = jax.ops.segment_min(before, image, num_segments=num_slots)
            odd = (before - first_of_image[image]) % 2 == 1
            direction = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.float32(1e-12))
            similarity = jnp.matmul(direction, direction.T, precision="highest")
            pair = (left & ~odd)[:, None] & (left & odd)[None, :] & (image[:, None] == image[None, :])
            similarity = jnp.where(pair, similarity, -jnp.inf)
            best, partner = similarity.max(axis=1), similarity.argmax(axis=1)
            # Each image's slots in a row, most similar pairs first; lexsort is stable.
            order = jnp.lexsort((-best, image))
            rank = jnp.zeros_like(slot).at[order].set(slot) - jnp.searchsorted(image, image).astype(jnp.int32)
            going = jnp.minimum(count - target, count // 2)
            goes = (best > -jnp.inf) & (rank < going[image])
            into = jnp.where(goes, partner, slot)
            weighted = jax.ops.segment_sum(x * size[:, None], into, num_segments=num_slots)
            size = jax.ops.segment_sum(size, into, num_segments=num_slots)
            left = left & ~goes
            return jnp.where(left[:, None], weighted / jnp.maximum(size, 1.0)[:, None], x), size, left

        left = is_token & (target[image] > 0)
        x, _, left = jax.lax.while_loop(
            unfinished, merge_round, (x.astype(jnp.float32), is_token.astype(jnp.float32), left)
        )
        ordinals = jnp.sort(jnp.where(left, slot, num_slots))[:capacity]
        return x.at[ordinals].get(mode="clip").astype(visual.dtype), ordinals

    samples = visual, jnp.asarray(layout.visual_position), jnp.asarray(layout.num_visual)
    return jax.lax.map(merge, samples)
