"""Gated FFN, dense and Probe-Activated Dynamic (paper; details in method.md).

Weights are stored [F, D], one row a unit, so that choosing units is a gather of contiguous rows; how a TPU keeps them is in
ops/stored_units.py. `simulated_dynamic_ffn` computes every unit and masks; `dynamic_ffn` is the measured path: gate, up and down
of the visual tokens are computed on the kept units only, and the probes share one pass over the full weights with the text
tokens.

Inside a `jax.shard_map` (parallel/model_axis.py) the same functions work on a shard's rows of the weights and return a partial
sum. Units are chosen globally: the [B, F] scores are gathered, never weights, and every shard runs the same top-U. How many of
them a shard owns is data; a static capacity takes the usual share and a loop of tiles the rest, so any distribution is exact
(our decision). With one shard nothing is gathered and there is no loop.

Axis letters: B batch, T packed slots (X text, P visual), D width, F units (of the shard), M probes, U kept units (of all shards),
C units that are computed at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.chunks import over_tokens, parts_of
from rlens_jax.plan import Reduction
from rlens_jax.sharding.model_axis import join_shards, num_shards, shard_index

HEADROOM = 1.05
"""Units that a shard takes without the loop, over its even share. Of randomly spread units a shard of a published model has more
than that in 0.1 % (7B over 4) to 24 % (0.5B over 8) of all cases, and then computes one tile more."""
TILE = 128
"""Rows of a matrix unit of a TPU: a smaller tile costs it the same."""


@runtime_checkable
class Units(Protocol):
    """The units of a layer's FFN (of this shard), in whatever form they are kept."""

    @property
    def number(self) -> int:
        """F, how many there are."""

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Every token through every unit."""

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        """Text through every unit, and `unit_scores` by the probes that stand behind it, in one pass over the weights."""

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        """`unit_scores`, with no more numbers at once than `chunk` tokens have in all units."""

    def through_rows(
        self, x: Float[Array, "B P D"], rows: Int[Array, "B own"], num_units: int
    ) -> Float[Array, "B P D"]:
        """Each sample's tokens through its own rows of the `num_units` that it kept on all shards (`own_rows`)."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FfnWeights:
    """The three matrices of a gated FFN, one row a unit."""

    gate: Float[Array, "F D"]
    up: Float[Array, "F D"]
    down: Float[Array, "F D"]

    @property
    def number(self) -> int:
        return self.gate.shape[0]

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return down_units(hidden_units(x, self), self)

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        num_text = x.shape[1] - is_probe.shape[1]
        hidden = hidden_units(x, self)
        return down_units(hidden[:, :num_text], self), unit_scores(hidden[:, num_text:], is_probe)

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        """Units, and not probes, go part by part, because the sum over the probes then has the order it has in one piece."""
        starts, size = parts_of(self.number, max(1, self.number * chunk // max(chunk, probes.shape[1])))

        def step(scores: Array, start: Array) -> tuple[Array, None]:
            part = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, start, size), self)
            some = unit_scores(hidden_units(probes, part), is_probe)
            return jax.lax.dynamic_update_slice_in_dim(scores, some, start, axis=1), None

        nothing = jnp.zeros((probes.shape[0], self.number), jnp.float32)
        return jax.lax.scan(step, nothing, jnp.asarray(starts))[0]

    def through_rows(
        self, x: Float[Array, "B P D"], rows: Int[Array, "B own"], num_units: int
    ) -> Float[Array, "B P D"]:
        capacity = shard_capacity(num_units, num_shards(), HEADROOM)
        each = jax.vmap(reduced_ffn, in_axes=(0, None, 0))
        return in_tiles(x, rows, self.number, capacity, lambda x, rows: each(x, self, rows))


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What the probes chose: unit numbers, best first, and whether all scores of the sample were numbers."""

    units: Int[Array, "B U"]
    scored: Bool[Array, " B"]


def hidden_units(x: Float[Array, "*T D"], weights: FfnWeights) -> Float[Array, "*T F"]:
    """H = silu(x Wg) * (x Wu)."""
    gate, up = (jnp.tensordot(x, matrix, (-1, -1)) for matrix in (weights.gate, weights.up))
    return jax.nn.silu(gate) * up


def down_units(hidden: Float[Array, "*T F"], weights: FfnWeights) -> Float[Array, "*T D"]:
    """Y = H Wd."""
    return jnp.tensordot(hidden, weights.down, 1)


def dense_ffn(x: Float[Array, "B T D"], units: Units, chunk: int | None = None) -> Float[Array, "B T D"]:
    """Every token through every unit, `chunk` tokens at a time or all at once."""
    return over_tokens(units.through_all, x, chunk)


def probe_slots(
    layout: TokenLayout, reduction: Reduction, random_key: Array
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """The probes' ordinals and which of them count (samples differ in M; the array is as wide as the largest can be).

    Strided probes sit at (i P) // M (our decision). Random ones (the paper's) are drawn without replacement from
    `random_key`, which names run and layer, and the sample's number.
    """
    visual_slots = layout.bucket.visual
    capacity = reduction.probe_capacity(visual_slots)
    counts = np.array([reduction.probe_count(n) for n in range(visual_slots + 1)], np.int32)
    count = jnp.asarray(counts)[layout.num_visual][:, None]
    index = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (count.shape[0], capacity))
    if reduction.probe == "strided":
        slots = index * layout.num_visual[:, None] // jnp.maximum(count, 1)
    else:
        keys = jax.vmap(lambda sample: jax.random.fold_in(random_key, sample))(layout.sample)
        draw = jax.vmap(lambda key: jax.random.uniform(key, (visual_slots,)))(keys)
        ordinal = jax.lax.broadcasted_iota(jnp.int32, draw.shape, 1)
        draw = jnp.where(ordinal < layout.num_visual[:, None], draw, 2.0)
        slots = jnp.argsort(draw, axis=1)[:, :capacity].astype(jnp.int32)
    return jnp.minimum(slots, visual_slots - 1), index < count


def choose_units(hidden: Float[Array, "B M F"], is_probe: Bool[Array, "B M"], num_units: int) -> Kept:
    """The `num_units` units with the largest mean |H| over the probes, in float32; ties go to the lower unit.

    Units of all shards compete, and are numbered through; every shard returns the same.
    """
    return best_units(unit_scores(hidden, is_probe), num_units)


def unit_scores(hidden: Float[Array, "B M F"], is_probe: Bool[Array, "B M"]) -> Float[Array, "B F"]:
    """Mean |H| over the probes of each sample, in float32."""
    magnitude = jnp.where(is_probe[:, :, None], jnp.abs(hidden.astype(jnp.float32)), 0.0)
    count = jnp.maximum(1, is_probe.sum(axis=1)).astype(jnp.float32)
    return magnitude.sum(axis=1) / count[:, None]


def best_units(scores: Float[Array, "B F"], num_units: int) -> Kept:
    """The `num_units` units with the largest scores of all shards; ties go to the lower unit."""
    scores = join_shards(scores, axis=1)
    _, units = jax.lax.top_k(scores, num_units)
    return Kept(units, jnp.isfinite(scores).all(axis=1))


def simulated_dynamic_ffn(
    x: Float[Array, "B T D"],
    weights: FfnWeights,
    layout: TokenLayout,
    reduction: Reduction,
    random_key: Array,
) -> tuple[Float[Array, "B T D"], Kept]:
    """The plain reference: all units for all tokens, then the dropped units of visual tokens are set to 0."""
    num_text = layout.bucket.text
    hidden = hidden_units(x, weights)
    slots, is_probe = probe_slots(layout, reduction, random_key)
    probes = jnp.take_along_axis(hidden[:, num_text:], slots[:, :, None], axis=1)
    kept = choose_units(probes, is_probe, reduction.kept_units(weights.gate.shape[0]))
    keep = jax.nn.one_hot(kept.units, hidden.shape[2], dtype=bool).any(axis=1)
    is_text = jnp.arange(hidden.shape[1]) < num_text
    hidden = jnp.where(is_text[None, :, None] | keep[:, None, :], hidden, jnp.zeros_like(hidden))
    return down_units(hidden, weights), kept


def dynamic_ffn(
    x: Float[Array, "B T D"],
    units: Units,
    layout: TokenLayout,
    reduction: Reduction,
    random_key: Array,
    imposed: Int[Array, "B U"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T D"], Kept]:
    """The measured path; same result as `simulated_dynamic_ffn`.

    Units that are `imposed` are used instead of what the probes choose, which is returned all the same. With several shards
    the states are this shard's part of a sum that is left to the caller (for text and visual tokens at once), and `Kept` is the
    same on all shards, in unit numbers of the whole FFN. With a `chunk`, hidden units of no more tokens than that are there at
    a time.
    """
    num_text = layout.bucket.text
    text, visual = x[:, :num_text], x[:, num_text:]
    slots, is_probe = probe_slots(layout, reduction, random_key)
    probes = jnp.take_along_axis(visual, slots[:, :, None], axis=1)
    if chunk is None or num_text + probes.shape[1] <= chunk:
        text, scores = units.text_and_scores(jnp.concatenate([text, probes], axis=1), is_probe)
    else:
        text, scores = dense_ffn(text, units, chunk), units.scores(probes, is_probe, chunk)
    num_units = reduction.kept_units(units.number * num_shards())
    kept = best_units(scores, num_units)
    rows = own_rows(kept.units if imposed is None else imposed, units.number)
    visual = over_tokens(lambda part: units.through_rows(part, rows, num_units), visual, chunk)
    return jnp.concatenate([text, visual], axis=1), kept


def shard_capacity(num_units: int, shards: int, headroom: float) -> int:
    """How many kept units a shard computes in any case: all, or about its share in whole tiles."""
    if shards == 1:
        return num_units
    share = math.ceil(num_units / shards * headroom)
    return share if share < TILE else math.ceil(share / TILE) * TILE


def own_rows(units: Int[Array, "B U"], num_rows: int) -> Int[Array, "B own"]:
    """The units that this shard owns, as ascending rows of its weights; `num_rows` itself fills up the rest.

    There is room for as many as a shard can own at all.
    """
    rows = units - shard_index() * num_rows
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    return jnp.sort(rows, axis=1)[:, :num_rows]


def in_tiles(
    x: Float[Array, "B P D"],
    rows: Int[Array, "B own"],
    num_rows: int,
    capacity: int,
    through: Callable[[Float[Array, "B P D"], Int[Array, "B C"]], Float[Array, "B P D"]],
) -> Float[Array, "B P D"]:
    """Each sample's visual tokens through its rows, which are sorted.

    The first `capacity` rows of all samples are computed at once. Whatever is left of some sample follows tile by tile, in a
    loop that runs once for each such tile; without a collective inside, shards may differ in how often.
    """
    most = rows.shape[1]
    y = through(x, rows[:, :capacity])
    if most <= capacity:
        return y
    tile = min(TILE, capacity)
    rows = jnp.pad(rows, ((0, 0), (0, -(most - capacity) % tile)), constant_values=num_rows)
    left = jnp.maximum((rows < num_rows).sum(axis=1) - capacity, 0)
    tiles = (left + tile - 1) // tile
    ends = jnp.cumsum(tiles)

    def add_tile(i: Array, y: Array) -> Array:
        sample = (ends <= i).sum()
        start = capacity + (i - ends[sample] + tiles[sample]) * tile
        part = jax.lax.dynamic_slice_in_dim(rows[sample], start, tile)
        return y.at[sample].add(through(x[sample][None], part[None])[0])

    return jax.lax.fori_loop(0, ends[-1], add_tile, y)


def reduced_ffn(x: Float[Array, "P D"], weights: FfnWeights, rows: Int[Array, " C"]) -> Float[Array, "P D"]:
    """One sample's visual tokens through the chosen units only; a row past the last one adds nothing."""
    chosen = jax.tree.map(lambda w: w.at[rows].get(mode="clip"), weights)
    hidden = hidden_units(x, chosen)
    hidden = jnp.where(rows[None, :] < weights.gate.shape[0], hidden, jnp.zeros_like(hidden))
    return down_units(hidden, chosen)
