"""Gated FFN, dense and Probe-Activated Dynamic (paper; docs/method.md).

`simulated_dynamic_ffn` is the plain reference: it computes every unit and masks. `dynamic_ffn` is the measured path: it computes
gate, up and down of the visual tokens on the kept units only, and the probes share one pass over all weights with the text.

Weights are stored [F, D], one row per unit, so that selecting units gathers contiguous rows (`FfnWeights`). A TPU may store
them as half rows, see `rlens_jax.ops.ffn_tpu`. Few visual tokens go through all units, masked, on the devices and at the
sizes where that is faster (`rlens_jax.ops.ffn_paths`). Inside a `jax.shard_map` the same functions work on a shard's rows (F
counts the shard's units) and return a partial sum. Units are chosen globally: the scores [B, F] are gathered, never weights,
and every shard runs the same top-U. The number of kept units per shard is data. A static capacity takes the usual share and a
loop of tiles the rest, so that any distribution is exact (our decision). With one shard nothing is gathered, and there is no
loop.
"""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.attention import equal_parts
from rlens_jax.ops.ffn_paths import GATHERED, Ways, Work
from rlens_jax.plans import Reduction
from rlens_jax.pytrees import pytree
from rlens_jax.sharding.model_axis import join_shards, num_shards, shard_index

HEADROOM = 1.05
"""Capacity of a shard before the loop, relative to its even share of the kept units. If units are spread at random, a shard of a
published model exceeds it in 0.1 % (7B over 4) to 24 % (0.5B over 8) of all cases, and then computes one more tile."""
TILE = 128
"""Kept units per step of the loop: the rows of a TPU's matrix unit. A smaller tile would take as long."""


@runtime_checkable
class Units(Protocol):
    """The FFN units of one layer (on this shard), in any form of storage."""

    @property
    def ways(self) -> Ways:
        """How visual tokens can go through some of the units."""

    @property
    def number(self) -> int:
        """F, the number of units."""

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Every token through every unit."""

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        """Text through every unit, and `unit_scores` of the probes that follow it, in one pass over the weights."""

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        """`unit_scores`, with at most as many hidden numbers in memory as `chunk` tokens have."""

    def through_rows(self, x: Float[Array, "B P D"], rows: Int[Array, "B rows"], num_units: int) -> Float[Array, "B P D"]:
        """Each sample's tokens through its kept units on this shard (`local_rows`); `num_units` counts those of all shards."""

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """`hidden_units` of every token."""

    def output(self, hidden: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Hidden units through the last matrix."""


@pytree
class FfnWeights:
    """The three matrices of a gated FFN, one row per unit. The output of hidden units is their product with `down`."""

    gate: Float[Array, "F D"]
    up: Float[Array, "F D"]
    down: Float[Array, "F D"]
    ways: Ways = field(default=GATHERED, kw_only=True, metadata={"static": True})

    @property
    def number(self) -> int:
        return self.gate.shape[0]

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.output(self.hidden(x))

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        num_text = x.shape[1] - is_probe.shape[1]
        hidden = hidden_units(x, self)
        return jnp.tensordot(hidden[:, :num_text], self.down, 1), unit_scores(hidden[:, num_text:], is_probe)

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        """Parts are made of units, not of probes, so that the sum over the probes keeps its order."""
        starts, size = equal_parts(self.number, max(1, self.number * chunk // max(chunk, probes.shape[1])))

        def step(scores: Array, start: Array) -> tuple[Array, None]:
            part = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, start, size), self)
            part_scores = unit_scores(hidden_units(probes, part), is_probe)
            return jax.lax.dynamic_update_slice_in_dim(scores, part_scores, start, axis=1), None

        no_scores = jnp.zeros((probes.shape[0], self.number), jnp.float32)
        return jax.lax.scan(step, no_scores, jnp.asarray(starts))[0]

    def through_rows(self, x: Float[Array, "B P D"], rows: Int[Array, "B rows"], num_units: int) -> Float[Array, "B P D"]:
        capacity = shard_capacity(num_units, num_shards(), HEADROOM)
        batched = jax.vmap(reduced_ffn, in_axes=(0, None, 0))
        return in_tiles(x, rows, self.number, capacity, lambda x, rows: batched(x, self, rows))

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        return hidden_units(x, self)

    def output(self, hidden: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        return jnp.tensordot(hidden, self.down, 1)


@pytree
class Kept:
    """The units that the probes chose."""

    units: Int[Array, "*L B U"]
    """Unit numbers, best first."""
    scored: Bool[Array, "*L B"]
    """Whether all scores of the sample were finite."""

    def padded(self, width: int) -> "Kept":
        """With zeros behind the units, `width` numbers in all."""
        room = [(0, 0)] * (self.units.ndim - 1) + [(0, width - self.units.shape[-1])]
        return Kept(jnp.pad(self.units, room), self.scored)


def hidden_units(x: Float[Array, "*T D"], weights: FfnWeights) -> Float[Array, "*T F"]:
    """H = silu(x Wg) * (x Wu)."""
    gate, up = (jnp.tensordot(x, matrix, (-1, -1)) for matrix in (weights.gate, weights.up))
    return jax.nn.silu(gate) * up


def dense_ffn(x: Float[Array, "B T D"], units: Units, chunk: int | None = None) -> Float[Array, "B T D"]:
    """Every token through every unit, at most `chunk` tokens at a time."""
    return over_tokens(units.through_all, x, chunk)


def over_tokens(function: Callable[[Array], Array], x: Float[Array, "B T D"], chunk: int | None) -> Float[Array, "B T D"]:
    """Applies `function`, which treats each token separately, to at most `chunk` tokens at a time; None: to all at once."""
    length = x.shape[1]
    if chunk is None or length <= chunk:
        return function(x)
    starts, size = equal_parts(length, chunk)

    def step(y: Array, start: Array) -> tuple[Array, None]:
        part = function(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=1), None

    return jax.lax.scan(step, jnp.zeros_like(x), jnp.asarray(starts))[0]


def probe_slots(layout: TokenLayout, reduction: Reduction, random_key: Array) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """Ordinals of the probes, and which entries are probes: samples differ in M, and the array has room for the largest.

    Strided probes lie at (i P) // M (our decision). Random probes (paper) are drawn without replacement. They follow from
    `random_key`, which identifies run and layer, and from the row's seed.
    """
    visual_slots = layout.bucket.visual
    capacity = reduction.probe_capacity(visual_slots)
    counts = np.array([reduction.probe_count(n) for n in range(visual_slots + 1)], np.int32)
    count = jnp.asarray(counts)[layout.num_visual][:, None]
    index = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (count.shape[0], capacity))
    if reduction.probe == "strided":
        slots = index * layout.num_visual[:, None] // jnp.maximum(count, 1)
    else:
        keys = jax.vmap(lambda seed: jax.random.fold_in(random_key, seed))(layout.seed)
        draw = jax.vmap(lambda key: jax.random.uniform(key, (visual_slots,)))(keys)
        ordinal = jax.lax.broadcasted_iota(jnp.int32, draw.shape, 1)
        draw = jnp.where(ordinal < layout.num_visual[:, None], draw, 2.0)
        slots = jnp.argsort(draw, axis=1)[:, :capacity].astype(jnp.int32)
    return jnp.minimum(slots, visual_slots - 1), index < count


def unit_scores(hidden: Float[Array, "B M F"], is_probe: Bool[Array, "B M"]) -> Float[Array, "B F"]:
    """Mean |H| over each sample's probes, in float32."""
    magnitude = jnp.where(is_probe[:, :, None], jnp.abs(hidden.astype(jnp.float32)), 0.0)
    count = jnp.maximum(1, is_probe.sum(axis=1)).astype(jnp.float32)
    return magnitude.sum(axis=1) / count[:, None]


def best_units(scores: Float[Array, "B F"], num_units: int) -> Kept:
    """The `num_units` units with the largest scores; ties go to the lower unit.

    Units of all shards compete. Every shard returns the same numbers, which count the units of all shards.
    """
    scores = join_shards(scores, axis=1)
    _, units = jax.lax.top_k(scores, num_units)
    return Kept(units, jnp.isfinite(scores).all(axis=1))


def simulated_dynamic_ffn(
    x: Float[Array, "B T D"], weights: FfnWeights, layout: TokenLayout, reduction: Reduction, random_key: Array
) -> tuple[Float[Array, "B T D"], Kept]:
    """The plain reference: computes all units for all tokens, then sets the dropped units of visual tokens to 0."""
    num_text = layout.bucket.text
    hidden = hidden_units(x, weights)
    slots, is_probe = probe_slots(layout, reduction, random_key)
    probes = jnp.take_along_axis(hidden[:, num_text:], slots[:, :, None], axis=1)
    kept = best_units(unit_scores(probes, is_probe), reduction.kept_units(weights.number))
    keep = jax.nn.one_hot(kept.units, hidden.shape[2], dtype=bool).any(axis=1)
    is_text = jnp.arange(hidden.shape[1]) < num_text
    hidden = jnp.where(is_text[None, :, None] | keep[:, None, :], hidden, jnp.zeros_like(hidden))
    return jnp.tensordot(hidden, weights.down, 1), kept


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

    `imposed` units replace those that the probes choose. At most `chunk` tokens have their hidden units in memory at a time.

    Returns:
        The output, with several shards this shard's summand of it; and what the probes chose, the same on all shards.
    """
    num_text, shards = layout.bucket.text, num_shards()
    text, visual = x[:, :num_text], x[:, num_text:]
    slots, is_probe = probe_slots(layout, reduction, random_key)
    num_units = reduction.kept_units(units.number * shards)
    work = Work(x.shape[0], num_text, slots.shape[1], visual.shape[1], units.number, num_units // shards)
    masks = units.ways.suited(work) == "masked"
    if masks and (chunk is None or x.shape[1] <= chunk):
        hidden = units.hidden(x)
        kept = best_units(unit_scores(_at(hidden[:, num_text:], slots), is_probe), num_units)
        rows = local_rows(kept.units if imposed is None else imposed, units.number)
        return units.output(jnp.concatenate([hidden[:, :num_text], masked(hidden[:, num_text:], rows)], axis=1)), kept
    probes = _at(visual, slots)
    if chunk is None or num_text + probes.shape[1] <= chunk:
        text, scores = units.text_and_scores(jnp.concatenate([text, probes], axis=1), is_probe)
    else:
        text, scores = dense_ffn(text, units, chunk), units.scores(probes, is_probe, chunk)
    kept = best_units(scores, num_units)
    rows = local_rows(kept.units if imposed is None else imposed, units.number)

    def through(part: Array) -> Array:
        return units.output(masked(units.hidden(part), rows)) if masks else units.through_rows(part, rows, num_units)

    return jnp.concatenate([text, over_tokens(through, visual, chunk)], axis=1), kept


def masked(hidden: Float[Array, "B T F"], rows: Int[Array, "B rows"]) -> Float[Array, "B T F"]:
    """Hidden units, with 0 for those outside each sample's `rows`; rows past the last unit are none."""
    keep = jnp.zeros((hidden.shape[0], hidden.shape[2]), bool)
    keep = keep.at[jnp.arange(hidden.shape[0])[:, None], rows].set(True, mode="drop")
    return jnp.where(keep[:, None], hidden, jnp.zeros((), hidden.dtype))


def _at(tokens: Float[Array, "B P N"], slots: Int[Array, "B M"]) -> Float[Array, "B M N"]:
    return jnp.take_along_axis(tokens, slots[:, :, None], axis=1)


def shard_capacity(num_units: int, shards: int, headroom: float) -> int:
    """Number of kept units that a shard computes before the loop: all, or about its share, in whole tiles."""
    if shards == 1:
        return num_units
    share = math.ceil(num_units / shards * headroom)
    return share if share < TILE else math.ceil(share / TILE) * TILE


def local_rows(units: Int[Array, "B U"], num_rows: int) -> Int[Array, "B own"]:
    """The units that lie on this shard, as ascending rows of its weights; the rest is filled with `num_rows`.

    The width is the largest number that can lie on one shard.
    """
    rows = units - shard_index() * num_rows
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    return jnp.sort(rows, axis=1)[:, :num_rows]


def in_tiles(
    x: Float[Array, "B P D"], rows: Int[Array, "B rows"], num_rows: int, capacity: int, through: Callable[[Array, Array], Array]
) -> Float[Array, "B P D"]:
    """Each sample's visual tokens `through` its rows, which are sorted.

    The first `capacity` rows of all samples are computed together. A loop computes the remaining rows tile by tile. Its number
    of steps may differ between shards, because it contains no collective.
    """
    most = rows.shape[1]
    y = through(x, rows[:, :capacity])
    if most <= capacity:
        return y
    tile = min(TILE, capacity)
    rows = jnp.pad(rows, ((0, 0), (0, -(most - capacity) % tile)), constant_values=num_rows)
    remaining = jnp.maximum((rows < num_rows).sum(axis=1) - capacity, 0)
    tiles = (remaining + tile - 1) // tile
    ends = jnp.cumsum(tiles)

    def add_tile(i: Array, y: Array) -> Array:
        sample = (ends <= i).sum()
        start = capacity + (i - ends[sample] + tiles[sample]) * tile
        part = jax.lax.dynamic_slice_in_dim(rows[sample], start, tile)
        return y.at[sample].add(through(x[sample][None], part[None])[0])

    return jax.lax.fori_loop(0, ends[-1], add_tile, y)


def reduced_ffn(x: Float[Array, "P D"], weights: FfnWeights, rows: Int[Array, " rows"]) -> Float[Array, "P D"]:
    """One sample's visual tokens through the chosen units only; rows past the last unit add nothing."""
    chosen = jax.tree.map(lambda w: w.at[rows].get(mode="clip"), weights)
    hidden = hidden_units(x, chosen)
    hidden = jnp.where(rows[None, :] < weights.number, hidden, jnp.zeros_like(hidden))
    return jnp.tensordot(hidden, chosen.down, 1)
