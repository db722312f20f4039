"""Which visual tokens of a packed batch survive: the most attended ones (FastV, PyramidDrop, SparseVLM), those least like a few
pivots (DART), or those left after merging similar ones (FOLDER).

Samples are ragged, so the number of survivors is data; the number of slots for them is static. Functions return the ordinals
of the survivors, ascending.

Additional axis word: `survivors`, the slots for them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.drops import num_merged, num_recycled
from rlens_jax.kept_tokens import Selection
from rlens_jax.layout import TokenLayout
from rlens_jax.ops.attention import MASKED, equal_parts
from rlens_jax.pruning import Folder
from rlens_jax.sharding.model_axis import num_shards, shard_index, stack_shards, sum_over_shards

SCORED_QUERIES = 64
"""Queries whose weights are in memory at a time (our decision)."""


def survivors_of(visual_slots: int, kept: Callable[[int], int]) -> Int[Array, " counts"]:
    """Number of survivors of 0, 1, ... `visual_slots` visual tokens."""
    return jnp.asarray([kept(n) for n in range(visual_slots + 1)], jnp.int32)


def num_survivors(layout: TokenLayout, pruning: Folder | Selection) -> Int[Array, " B"]:
    """Number of visual tokens per sample that survive before the first layer."""
    return survivors_of(layout.bucket.visual, pruning.kept)[layout.num_visual]


def attention_received(
    q: Float[Array, "B N queries H"],
    k: Float[Array, "B K S H"],
    sees: Callable[[Int[Array, " block"]], Bool[Array, "B block S"]],
    asks: Bool[Array, "B queries"],
) -> Float[Array, "B N S"]:
    """Attention weights of each head of this shard, the mean over the queries that ask, in float32.

    Only the weights of a block of queries are in memory at a time. A row in which no query asks is 0.

    Args:
        q: queries of chosen tokens.
        k: keys of all tokens.
        sees: which keys some queries see, from their numbers.
        asks: the queries that count.
    """
    batch, num_heads, num_queries, head_dim = q.shape
    scaled = q * jnp.asarray(head_dim**-0.5, q.dtype)
    grouped = scaled.reshape(batch, k.shape[1], num_heads // k.shape[1], num_queries, head_dim)
    starts, size = equal_parts(num_queries, SCORED_QUERIES)
    # Parts overlap; each query counts in the first one that has it.
    first_new = np.concatenate([starts[:1], starts[:-1] + size])

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        start, first = part
        number = start + jnp.arange(size, dtype=jnp.int32)
        block = jax.lax.dynamic_slice_in_dim(grouped, start, size, axis=3)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", block, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(sees(number)[:, None, None], scores, jnp.float32(MASKED)), axis=-1)
        counts = (asks[:, number] & (number >= first)[None])[:, None, None, :, None]
        return total + jnp.where(counts, weights, jnp.float32(0)).sum(axis=3), None

    total = jnp.zeros((*grouped.shape[:3], k.shape[2]), jnp.float32)
    total, _ = jax.lax.scan(add, total, (jnp.asarray(starts), jnp.asarray(first_new)))
    return total.reshape(batch, num_heads, -1) / jnp.maximum(asks.sum(axis=1), 1)[:, None, None].astype(jnp.float32)


def mean_of_heads(received: Float[Array, "B N S"], visual: slice, best: int | None = None) -> Float[Array, "B S"]:
    """Mean over all heads of all shards, or over the `best` ones that give most to the keys `visual`; ties: the lower head."""
    if best is None or best >= received.shape[1] * num_shards():
        return sum_over_shards(received.sum(axis=1)) / jnp.float32(received.shape[1] * num_shards())
    mass = received[:, :, visual].sum(axis=2)
    everyone = jnp.moveaxis(stack_shards(mass), 0, 1).reshape(mass.shape[0], -1)
    _, chosen = jax.lax.top_k(everyone, best)
    mine = shard_index() * mass.shape[1] + jnp.arange(mass.shape[1], dtype=jnp.int32)
    counts = (chosen[:, None, :] == mine[None, :, None]).any(axis=2)
    return sum_over_shards(jnp.where(counts[:, :, None], received, jnp.float32(0)).sum(axis=1)) / jnp.float32(best)


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


def least_similar(
    states: Float[Array, "B P D"],
    pivots: Float[Array, "B pivots D"],
    is_pivot: Bool[Array, "B pivots"],
    taken: Bool[Array, "B P"],
    layout: TokenLayout,
    budget: Int[Array, " B"],
) -> Bool[Array, "B P"]:
    """DART: which visual tokens stay, `budget` in addition to those `taken` already.

    The budget is dealt to a sample's pivots, the remainder to the first ones. Pivot by pivot, its share of the tokens that are
    not yet taken is taken, those with the smallest cosines; ties go to the lower ordinal.
    """
    ordinal = jax.lax.broadcasted_iota(jnp.int32, taken.shape, 1)
    directions, toward = (_directions(x.astype(jnp.float32)) for x in (states, pivots))
    cosine = jnp.einsum("BCD,BPD->CBP", toward, directions, precision="highest")
    real, rank = ordinal < jnp.asarray(layout.num_visual)[:, None], jnp.cumsum(is_pivot, axis=1) - 1
    count = jnp.maximum(is_pivot.sum(axis=1), 1)[:, None]
    share = jnp.where(is_pivot, budget[:, None] // count + (rank < budget[:, None] % count).astype(jnp.int32), 0)

    def take(taken: Array, pivot: tuple[Array, Array]) -> tuple[Array, None]:
        similar, number = pivot
        order = jnp.argsort(jnp.where(real & ~taken, similar, jnp.inf), axis=1, stable=True)
        return taken | (jnp.argsort(order, axis=1) < number[:, None]), None

    return jax.lax.scan(take, taken, (cosine, share.T))[0] & real


def recycle(
    tokens: Float[Array, "B P width"], scores: Float[Array, "B P"], dropped: Bool[Array, "B P"], most: int, width: int
) -> tuple[Float[Array, "B P width"], Bool[Array, "B P"]]:
    """SparseVLM 1.5: merges the best of the dropped tokens around peaks of density.

    Of n dropped tokens, the m = floor(0.3 n) + 1 with the largest scores form c = floor(m / 10) + 1 clusters. With distances
    divided by sqrt(D), a token's density is exp(- mean of the squared distances to the c nearest, itself included), and its peak
    is the least distance to a denser token, or the largest of all distances if there is none. The centres have the largest
    products of both. The others join the nearest centre. All ties go to the lower ordinal. The authors' code adds noise to the
    densities, and puts the merged tokens behind all others; here each takes the place of its centre (our decision).

    Args:
        tokens: what is merged; the first `width` numbers are compared.
        scores: those of all tokens.
        dropped: the tokens that are not kept.
        most: max number of dropped tokens of a sample, n.
        width: numbers of a token that are compared, D.

    Returns:
        The tokens with each centre replaced by its cluster's mean, and which ones are centres.
    """
    num_slots = tokens.shape[1]
    number = dropped.sum(axis=1)
    recycled = jnp.asarray([num_recycled(n) for n in range(most + 1)], jnp.int32)[number]
    clusters = jnp.asarray([num_merged(num_recycled(n)) for n in range(most + 1)], jnp.int32)[number]
    _, best = jax.lax.top_k(jnp.where(dropped, scores, -jnp.inf), num_recycled(most))
    slot = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    real = slot < recycled[:, None]
    place = jnp.sort(jnp.where(real, best, num_slots), axis=1)
    chosen = jnp.take_along_axis(tokens.astype(jnp.float32), place[:, :, None], axis=1, mode="clip")
    compared, pairs = chosen[:, :, :width], real[:, :, None] & real[:, None, :]
    # From differences: products would cancel, and this decides who is nearest.
    squares = jax.lax.map(lambda x: jnp.square(x[:, None] - x[None]).sum(axis=-1), compared) / jnp.float32(width)
    squares = jnp.where(pairs, squares, jnp.inf)
    nearest = jnp.where(slot[:, None] < clusters[:, None, None], jnp.sort(squares, axis=2), jnp.float32(0))
    density = jnp.exp(-nearest.sum(axis=2) / jnp.maximum(clusters, 1)[:, None].astype(jnp.float32))
    distance = jnp.sqrt(squares)
    earlier = slot[:, None, :] < slot[:, :, None]
    mine, other = density[:, :, None], density[:, None, :]
    denser = pairs & ((other > mine) | ((other == mine) & earlier))
    peak = jnp.where(denser, distance, jnp.inf).min(axis=2)
    largest = jnp.where(pairs, distance, jnp.float32(0)).max(axis=(1, 2))[:, None]
    order = jnp.argsort(jnp.where(real, -density * jnp.where(denser.any(axis=2), peak, largest), jnp.inf), axis=1, stable=True)
    is_centre = (jnp.argsort(order, axis=1) < clusters[:, None]) & real
    # A centre may have a twin, so its own cluster is not the nearest one by distance alone.
    own = jnp.where(is_centre, slot, jnp.where(is_centre[:, None, :], distance, jnp.inf).argmin(axis=2))
    members = (own[:, None, :] == slot[:, :, None]) & real[:, None, :]
    mean = jnp.einsum("BCM,BMD->BCD", members.astype(jnp.float32), chosen, precision="highest")
    mean = mean / jnp.maximum(members.sum(axis=2), 1)[:, :, None].astype(jnp.float32)
    row, target = jnp.arange(tokens.shape[0])[:, None], jnp.where(is_centre, place, num_slots)
    merged = tokens.at[row, target].set(mean.astype(tokens.dtype), mode="drop")
    return merged, jnp.zeros(dropped.shape, bool).at[row, target].set(True, mode="drop")


def _directions(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.float32(1e-12))


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
    survivors, capacity = survivors_of(num_slots, pruning.kept), pruning.kept(num_slots)
    slot = jnp.arange(num_slots, dtype=jnp.int32)

    def merge(
        sample: tuple[Float[Array, "P visual_width"], Int[Array, " P"], Int[Array, ""]],
    ) -> tuple[Float[Array, "survivors visual_width"], Int[Array, " survivors"]]:
        x, position, num_visual = sample
        is_token = slot < num_visual
        image = jnp.cumsum(position != jnp.roll(position, 1) + 1).astype(jnp.int32) - 1
        tokens = _count_per_image(is_token, image)
        so_far = jnp.cumsum(tokens)
        target = survivors[so_far] - survivors[so_far - tokens]

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
    direction = _directions(compared)
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
