"""Which visual tokens of a packed batch a baseline keeps before the first layer (`rlens_jax.kept_tokens`).

Functions choose for all samples at once, in static shapes: the number of survivors of each sample is data, that of slots for them
is `capacity`. They return the ordinals of the survivors, ascending; unused slots hold P. Scores are float32, ties go to the lower
ordinal. Greedy choices are loops over `capacity` steps, in which a sample with a smaller budget is masked in its last ones.

Additional axis words: `survivors`, the slots for them; `text`, some text slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.kept_tokens import Pooling, VisionZip
from rlens_jax.layout import TokenLayout
from rlens_jax.ops.token_pruning import most_attended

BLOCK = 512
"""Rows of the matrix of similarities that are in memory at a time."""
RELEVANCE_WEIGHT = 0.5 / (2 * (1 - 0.5))
"""alpha = w / (2 (1 - w)) of CDPruner's kernel, with w = 0.5."""
LEAST_GAIN = 1e-9
"""Of a step of CDPruner: the tokens chosen then span the others, and the rest is filled by relevance."""


class Budget(NamedTuple):
    """How many tokens stay."""

    num_kept: Int[Array, " B"]
    capacity: int
    """Static, at least the largest of them."""


Ordinals = Int[Array, "B survivors"]


def drawn_tokens(layout: TokenLayout, budget: Budget, key: Array) -> Ordinals:
    """Tokens drawn without replacement. The draw follows from `key` and the row's seed, whatever its bucket or batch."""

    def scores(seed: Int[Array, ""]) -> Float[Array, " P"]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, seed), jnp.arange(layout.bucket.visual))
        return jax.vmap(jax.random.uniform)(keys)

    return most_attended(jax.vmap(scores)(jnp.asarray(layout.seed)), layout, *budget)


def strided_tokens(layout: TokenLayout, budget: Budget) -> Ordinals:
    """The ordinals floor(i P / T*)."""
    slot = jnp.arange(budget.capacity, dtype=jnp.int32)[None]
    count = budget.num_kept[:, None]
    strided = slot * jnp.asarray(layout.num_visual)[:, None] // jnp.maximum(count, 1)
    return jnp.where(slot < count, strided, layout.bucket.visual)


def pooled_tokens(
    visual: Float[Array, "B P visual_width"], layout: TokenLayout, budget: Budget, pooling: Pooling
) -> tuple[Float[Array, "B survivors visual_width"], Ordinals]:
    """Averages of the cells of each image's grid, and the ordinals of the tokens in their middles."""
    slots, side = layout.bucket.visual, pooling.side
    cells_of = jnp.asarray([pooling.cells(count) for count in range(slots + 1)], jnp.int32)
    cells = jnp.maximum(1, cells_of[layout.num_visual])[:, None]
    slot = jnp.arange(budget.capacity, dtype=jnp.int32)[None]
    image, cell = slot // cells**2, slot % cells**2
    row, row_weight = _cells(cell // cells, cells, side)
    column, column_weight = _cells(cell % cells, cells, side)
    token = jnp.arange(slots, dtype=jnp.int32)
    weights = row_weight[:, :, token % side**2 // side] * column_weight[:, :, token % side]
    weights = jnp.where(image[:, :, None] == (token // side**2)[None, None], weights, 0.0)
    pooled = jnp.einsum("BsP,BPW->BsW", weights, visual.astype(jnp.float32), precision="highest")
    ordinals = image * side**2 + row * side + column
    return pooled.astype(visual.dtype), jnp.where(slot < budget.num_kept[:, None], ordinals, slots)


def _cells(
    cell: Int[Array, "B survivors"], cells: Int[Array, "B one"], side: int
) -> tuple[Int[Array, "B survivors"], Float[Array, "B survivors side"]]:
    """Along one axis, the middle of a cell, and the weight of each place in its mean."""
    start, stop = cell * side // cells, -(-(cell + 1) * side // cells)
    place = jnp.arange(side, dtype=jnp.int32)[None, None]
    inside = (place >= start[:, :, None]) & (place < stop[:, :, None])
    return (start + stop - 1) // 2, inside.astype(jnp.float32) / (stop - start)[:, :, None].astype(jnp.float32)


def most_diverse(tokens: Float[Array, "B P width"], layout: TokenLayout, budget: Budget) -> tuple[Ordinals, Bool[Array, " B"]]:
    """The tokens that lie farthest from each other, d = 1 - cosine (DivPrune), and whether all were finite.

    First comes the token whose nearest other one is farthest, and then always the one whose nearest chosen one is farthest.
    """
    direction, real = _directions(tokens), _is_token(layout)
    rows = jnp.arange(len(real))

    def choose(step: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        least, chosen = carry
        best = least.argmax(axis=1)
        distance = 1 - jnp.einsum("BPD,BD->BP", direction, direction[rows, best], precision="highest")
        # To those chosen; before the first one, it was the distance to the nearest other token.
        least = jnp.where(step == 0, distance, jnp.minimum(least, distance))
        chosen = chosen.at[rows, best].max(step < budget.num_kept)
        return jnp.where(chosen | ~real, -jnp.inf, least), chosen

    first = jnp.where(real, _nearest_other(direction, real), -jnp.inf)
    _, chosen = jax.lax.fori_loop(0, budget.capacity, choose, (first, jnp.zeros(real.shape, bool)))
    return _ordinals(chosen, budget), _finite(direction, real)


def relevance(
    tokens: Float[Array, "B P width"], layout: TokenLayout, text: Float[Array, "B text width"], is_question: Bool[Array, "B text"]
) -> Float[Array, "B P"]:
    """The mean cosine of each visual token with the question's tokens, scaled to [0, 1] within the sample; 1 if all are equal."""
    asked = jnp.where(is_question[:, :, None], _directions(text), 0.0).sum(axis=1)
    asked = asked / jnp.maximum(1, is_question.sum(axis=1)).astype(jnp.float32)[:, None]
    cosine, real = jnp.einsum("BPD,BD->BP", _directions(tokens), asked, precision="highest"), _is_token(layout)
    low = jnp.where(real, cosine, jnp.inf).min(axis=1, keepdims=True)
    spread = jnp.where(real, cosine, -jnp.inf).max(axis=1, keepdims=True) - low
    return jnp.where(spread > 0, (cosine - low + 1e-6) / jnp.where(spread > 0, spread, 1.0), 1.0)


def most_relevant_and_diverse(
    tokens: Float[Array, "B P width"], relevant: Float[Array, "B P"], layout: TokenLayout, budget: Budget
) -> tuple[Ordinals, Bool[Array, " B"]]:
    """A greedy maximum of det L over sets of T* tokens (CDPruner), and whether all scores were finite.

    L_ij = r_i cos_ij r_j with r = exp(alpha relevance). Each step takes the token that adds most to log det L; its row of the
    Cholesky factor tells what is left of the others. Where nothing is left, the most relevant ones follow.
    """
    direction, real = _directions(tokens), _is_token(layout)
    weight = jnp.exp(RELEVANCE_WEIGHT * relevant)
    rows = jnp.arange(len(real))

    def choose(step: Int[Array, ""], carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        left, factor, free, chosen = carry
        gain = jnp.where(free, left, -jnp.inf)
        spent = gain.max(axis=1) <= LEAST_GAIN
        best = jnp.where(spent, jnp.where(free, relevant, -jnp.inf).argmax(axis=1), gain.argmax(axis=1))
        cosine = jnp.einsum("BPD,BD->BP", direction, direction[rows, best], precision="highest")
        known = jnp.einsum("BsP,Bs->BP", factor, factor[rows, :, best], precision="highest")
        row = (weight * cosine * weight[rows, best][:, None] - known) / jnp.sqrt(jnp.maximum(left[rows, best], LEAST_GAIN))[
            :, None
        ]
        row = jnp.where(spent[:, None], 0.0, row)
        factor = jax.lax.dynamic_update_slice_in_dim(factor, row[:, None], step, axis=1)
        chosen = chosen.at[rows, best].max(step < budget.num_kept)
        return left - row**2, factor, free.at[rows, best].set(False), chosen

    start = (
        weight**2 * (direction**2).sum(axis=-1),
        jnp.zeros((len(real), budget.capacity, real.shape[1]), jnp.float32),
        real,
        jnp.zeros(real.shape, bool),
    )
    chosen = jax.lax.fori_loop(0, budget.capacity, choose, start)[3]
    return _ordinals(chosen, budget), _finite(direction, real) & jnp.where(real, jnp.isfinite(relevant), True).all(axis=1)


def zipped_tokens(
    visual: Float[Array, "B P visual_width"],
    marks: Float[Array, "B P marks"],
    layout: TokenLayout,
    budget: Budget,
    zipped: VisionZip,
) -> tuple[Float[Array, "B survivors visual_width"], Ordinals]:
    """The dominant tokens, and the others merged into contextual ones (VisionZip), in order.

    Of n others c become contextual, every floor(n / c)-th. Each of the rest goes to the one whose key is most similar (cosine).
    A contextual token is itself plus the mean of those that went to it, and stays in its place.
    """
    slots, num_visual = layout.bucket.visual, jnp.asarray(layout.num_visual)
    counts = [zipped.contextual(count) for count in range(slots + 1)]
    contextual, room = jnp.asarray(counts, jnp.int32)[num_visual], max(1, *counts)
    num_dominant = budget.num_kept - contextual
    rows = jnp.arange(len(visual))[:, None]
    dominant = jnp.zeros((len(visual), slots), bool)
    dominant = dominant.at[rows, most_attended(marks[:, :, 0], layout, num_dominant, budget.capacity)].set(True, mode="drop")
    others = _is_token(layout) & ~dominant
    place = jnp.cumsum(others, axis=1) - 1
    step = jnp.maximum(1, (num_visual - num_dominant) // jnp.maximum(1, contextual))[:, None]
    is_target = others & (place % step == 0) & (place // step < contextual[:, None])
    targets = _ordinals(is_target, Budget(contextual, room))
    key = _directions(marks[:, :, 1:])
    cosine = jnp.einsum("BPH,BcH->BPc", key, _take(key, targets), precision="highest")
    cosine = jnp.where((targets < slots)[:, None], cosine, -jnp.inf)
    goes = (others & ~is_target)[:, :, None] & (cosine.argmax(axis=2)[:, :, None] == jnp.arange(room)[None, None])
    x = visual.astype(jnp.float32)
    count = goes.sum(axis=1, dtype=jnp.float32)[:, :, None]
    mean = jnp.einsum("BPc,BPW->BcW", goes.astype(jnp.float32), x, precision="highest") / jnp.maximum(1, count)
    merged = _take(x, targets) + mean
    if zipped.merge == "mean":
        merged = jnp.where(count > 0, merged / 2, merged)
    ordinals = _ordinals(dominant | is_target, budget)
    return _take(x.at[rows, targets].set(merged, mode="drop"), ordinals).astype(visual.dtype), ordinals


def _take(x: Float[Array, "B P width"], ordinals: Int[Array, "B chosen"]) -> Float[Array, "B chosen width"]:
    """The tokens with these ordinals; the last slot in place of P."""
    return jnp.take_along_axis(x, ordinals[:, :, None], axis=1, mode="clip")


def _directions(tokens: Float[Array, "B P width"]) -> Float[Array, "B P width"]:
    """Tokens of length 1, float32; 0 stays 0."""
    x = tokens.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.float32(1e-12))


def _nearest_other(direction: Float[Array, "B P width"], real: Bool[Array, "B P"]) -> Float[Array, "B P"]:
    """The distance of each token to the nearest other token of its sample, by blocks of rows; infinite if there is none."""
    batch, slots, width = direction.shape
    size = min(slots, BLOCK)
    count = -(-slots // size)
    blocks = jnp.pad(direction, ((0, 0), (0, count * size - slots), (0, 0))).reshape(batch, count, size, width)

    def nearest(block: tuple[Array, Array]) -> Float[Array, "B size"]:
        number, rows = block
        cosine = jnp.einsum("BpD,BPD->BpP", rows, direction, precision="highest")
        itself = (number * size + jnp.arange(size))[None, :, None] == jnp.arange(slots)[None, None]
        return 1 - jnp.where(itself | ~real[:, None], -jnp.inf, cosine).max(axis=-1)

    found = jax.lax.map(nearest, (jnp.arange(count), blocks.swapaxes(0, 1)))
    return found.swapaxes(0, 1).reshape(batch, count * size)[:, :slots]


def _is_token(layout: TokenLayout) -> Bool[Array, "B P"]:
    """Which visual slots hold a token."""
    return jnp.arange(layout.bucket.visual)[None] < jnp.asarray(layout.num_visual)[:, None]


def _ordinals(chosen: Bool[Array, "B P"], budget: Budget) -> Ordinals:
    slots = chosen.shape[1]
    return jnp.sort(jnp.where(chosen, jnp.arange(slots, dtype=jnp.int32)[None], slots), axis=1)[:, : budget.capacity]


def _finite(direction: Float[Array, "B P width"], real: Bool[Array, "B P"]) -> Bool[Array, " B"]:
    return jnp.where(real[:, :, None], jnp.isfinite(direction), True).all(axis=(1, 2))
