"""Which visual tokens of a packed batch survive: the most attended (FastV), or those left after merging similar ones (FOLDER).

Samples are ragged, so the number of survivors is data; the number of slots for them is static. Functions return the ordinals
of the survivors, ascending.

Additional axis word: `survivors`, the slots for them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.attention import MASKED
from rlens_jax.pruning import Folder, Pruning
from rlens_jax.sharding.model_axis import num_shards, sum_over_shards


def num_survivors(layout: TokenLayout, pruning: Pruning) -> Int[Array, " B"]:
    """Number of surviving visual tokens per sample."""
    return _survivors_of(layout, pruning)[layout.num_visual]


def _survivors_of(layout: TokenLayout, pruning: Pruning) -> Int[Array, " counts"]:
    """Number of survivors of 0, 1, ... P visual tokens."""
    return jnp.asarray([pruning.kept(n) for n in range(layout.bucket.visual + 1)], jnp.int32)


def attention_received(q: Float[Array, "B N H"], k: Float[Array, "B K S H"], sees: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Attention weights of one query per sample, averaged over all heads of all shards, in float32 (FastV).

    `sees` says which keys the query sees.
    """
    batch, num_heads, head_dim = q.shape
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    grouped = scaled.reshape(batch, k.shape[1], num_heads // k.shape[1], head_dim)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, jnp.float32(MASKED)), axis=-1)
    return sum_over_shards(weights.sum(axis=(1, 2))) / jnp.float32(num_heads * num_shards())


def most_attended(
    scores: Float[Array, "B P"], layout: TokenLayout, num_kept: Int[Array, " B"], capacity: int
) -> Int[Array, "B survivors"]:
    """Ordinals of each sample's `num_kept` visual tokens with the largest scores; ties go to the lower ordinal.

    The `capacity` - `num_kept` slots after them hold P.
    """
    ordinal = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(ordinal < jnp.asarray(layout.num_visual)[:, None], scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, capacity)
    rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    return jnp.sort(jnp.where(rank < num_kept[:, None], best, scores.shape[1]), axis=1)


def merge_similar(
    visual: Float[Array, "B P visual_width"], layout: TokenLayout, pruning: Folder, width: int
) -> tuple[Float[Array, "B survivors visual_width"], Int[Array, "B survivors"]]:
    """Merges the most similar visual tokens by bipartite matching, as FOLDER's published code does.

    Each image is merged in rounds. A round assigns the remaining tokens alternately to two sets. Each token of the first set
    finds the most similar token (by cosine) of the second. The most similar pairs are merged, at most half of the tokens per
    round, until the image has its target number. A merged token is the mean of all tokens in it and takes the place of the one
    in the second set. Unlike the published code, merged tokens are not scaled by 1 + log of their number, and no class token
    is spared.

    An *image* is a run of visual tokens without text between them (our decision: slices or tiles with text between them count
    separately). Targets are cumulative: after each image, the number of survivors so far equals that of a single image with all
    tokens so far. The number of survivors therefore depends only on the number of visual tokens. An image whose target is 0
    loses all its tokens (our decision).

    Tokens are compared by their first `width` numbers. The others, deepstack features, are merged along with them (our decision).

    Returns:
        The survivors and their ordinals; unused slots hold the ordinal P.
    """
    num_slots = visual.shape[1]
    survivors_of, capacity = _survivors_of(layout, pruning), pruning.kept(num_slots)
    slot = jnp.arange(num_slots, dtype=jnp.int32)

    def merge(
        sample: tuple[Float[Array, "P visual_width"], Int[Array, " P"], Int[Array, ""]],
    ) -> tuple[Float[Array, "survivors visual_width"], Int[Array, " survivors"]]:
        x, position, num_visual = sample
        is_token = slot < num_visual
        image = jnp.cumsum(position != jnp.roll(position, 1) + 1).astype(jnp.int32) - 1
        tokens = _count_per_image(is_token, image)
        so_far = jnp.cumsum(tokens)
        target = survivors_of[so_far] - survivors_of[so_far - tokens]

        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            remains = carry[2]
            return (_count_per_image(remains, image) > target).any()

        remains = is_token & (target[image] > 0)
        x, _, remains = jax.lax.while_loop(
            unfinished,
            partial(_merge_round, image, target, width),
            (x.astype(jnp.float32), is_token.astype(jnp.float32), remains),
        )
        ordinals = jnp.sort(jnp.where(remains, slot, num_slots))[:capacity]
        return x.at[ordinals].get(mode="clip").astype(visual.dtype), ordinals

    return jax.lax.map(merge, (visual, jnp.asarray(layout.visual_position), jnp.asarray(layout.num_visual)))


def _merge_round(
    image: Int[Array, " P"],
    target: Int[Array, " P"],
    width: int,
    carry: tuple[Float[Array, "P visual_width"], Float[Array, " P"], Bool[Array, " P"]],
) -> tuple[Float[Array, "P visual_width"], Float[Array, " P"], Bool[Array, " P"]]:
    """One round of `merge_similar` for one sample.

    Args:
        image: number of the image to which each slot belongs.
        target: number of survivors, by number of the image.
        width: numbers of a token that are compared.
        carry: states, how many tokens each one is the mean of, and which slots remain.
    """
    x, size, remains = carry
    num_slots = image.shape[0]
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    count = _count_per_image(remains, image)
    before = jnp.cumsum(remains.astype(jnp.int32)) - remains.astype(jnp.int32)
    first_of_image = jax.ops.segment_min(before, image, num_segments=num_slots)
    in_second_set = (before - first_of_image[image]) % 2 == 1
    compared = x[:, :width]
    direction = compared / jnp.maximum(jnp.linalg.norm(compared, axis=1, keepdims=True), jnp.float32(1e-12))
    similarity = jnp.matmul(direction, direction.T, precision="highest")
    pairs = (remains & ~in_second_set)[:, None] & (remains & in_second_set)[None, :]
    pairs = pairs & (image[:, None] == image[None, :])
    similarity = jnp.where(pairs, similarity, -jnp.inf)
    best, partner = similarity.max(axis=1), similarity.argmax(axis=1)
    # Slots sorted by image, then by falling similarity; lexsort is stable.
    order = jnp.lexsort((-best, image))
    rank = jnp.zeros_like(slot).at[order].set(slot) - jnp.searchsorted(image, image).astype(jnp.int32)
    num_merged = jnp.minimum(count - target, count // 2)
    merges = (best > -jnp.inf) & (rank < num_merged[image])
    destination = jnp.where(merges, partner, slot)
    weighted = jax.ops.segment_sum(x * size[:, None], destination, num_segments=num_slots)
    size = jax.ops.segment_sum(size, destination, num_segments=num_slots)
    remains = remains & ~merges
    return jnp.where(remains[:, None], weighted / jnp.maximum(size, 1.0)[:, None], x), size, remains


def _count_per_image(chosen: Bool[Array, " P"], image: Int[Array, " P"]) -> Int[Array, " P"]:
    """Number of chosen slots by number of the image; there are at most P images."""
    return jax.ops.segment_sum(chosen.astype(jnp.int32), image, num_segments=image.shape[0])
