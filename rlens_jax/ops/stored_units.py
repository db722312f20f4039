"""FFN units as a TPU keeps them for the kernel of ops/row_gather.py: those of all layers as one [L, F, 2, D / 2] array a matrix.

A unit is then contiguous in bfloat16 too, and the kernel reads the chosen ones out of the whole stack: XLA would copy a layer's
slice for it. XLA's own products read this form without a copy in HBM only part by part, so a pass of a few thousand tokens over
all units is a loop of parts, each cut out of the stack into VMEM. Every weight is then read once, on v5e, v5p and v6e and on any
number of shards (benchmarks/weight_traffic.py).

Axis letters: B batch, T tokens (X text, M probes behind them; P visual), D width, L layers, F units (of the shard).
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.ops.ffn import FfnWeights, in_tiles, shard_capacity, unit_scores
from rlens_jax.ops.row_gather import fetched_ffn
from rlens_jax.sharding.model_axis import num_shards

PART_BYTES = 17 << 20
"""Of a matrix, at most, that a pass over all units takes at a time; v5p, with the least VMEM, holds three of them."""
MOST_TOKENS = 4096
"""Of all samples, that take the units part by part. The sums of more do not stay in VMEM from part to part, and to bring them in
and out costs more than a copy of the weights, which then is little beside the tokens (the dry run's HBM traffic shows both)."""
HEADROOM = 1.5
"""Chosen units that there is room for, over a shard's even share. The kernel fetches and computes only as many as there are, so
room costs nothing but VMEM; the loop for more is left to units that are not spread at all."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnitStack:
    """The three matrices of all layers' FFNs, a unit's row in two halves."""

    gate: Float[Array, "L F 2 half"]
    up: Float[Array, "L F 2 half"]
    down: Float[Array, "L F 2 half"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredUnits:
    """One layer's `rlens_jax.ops.ffn.Units`."""

    stack: UnitStack
    layer: Int[Array, ""]

    @property
    def number(self) -> int:
        return self.stack.gate.shape[1]

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        no_probes = jnp.zeros((x.shape[0], 0), bool)
        return self.text_and_scores(x, no_probes)[0]

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        if x.shape[0] * x.shape[1] > MOST_TOKENS:
            return self._rows().text_and_scores(x, is_probe)
        return self._in_parts(x, is_probe)

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        if probes.shape[0] * probes.shape[1] > MOST_TOKENS or probes.shape[1] > chunk:
            return self._rows().scores(probes, is_probe, chunk)
        return self._in_parts(probes, is_probe)[1]

    def _rows(self) -> FfnWeights:
        """The layer's units as [F, D], which is a copy of them."""
        return FfnWeights(*(matrix.reshape(self.number, -1) for matrix in self._part(0, self.number)))

    def _in_parts(self, x: Array, is_probe: Array) -> tuple[Array, Array]:
        """`text_and_scores`, a part of the units at a time; text is summed over the parts in float32."""
        batch, tokens, width = x.shape
        num_text = tokens - is_probe.shape[1]
        # At least two parts: a loop of one is no loop, and then XLA copies the whole matrix in HBM.
        size = part_size(self.number, min(PART_BYTES // (width * x.dtype.itemsize), self.number // 2))
        halves = jnp.moveaxis(x.reshape(batch, tokens, 2, width // 2), 2, 0)

        def add_part(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            y, scores = carry
            start = i * size
            gate, up, down = self._part(start, size)
            gated, linear = (jnp.einsum("kbtd,fkd->btf", halves, matrix) for matrix in (gate, up))
            hidden = jax.nn.silu(gated) * linear
            y += jnp.einsum("btf,fkd->kbtd", hidden[:, :num_text], down, preferred_element_type=jnp.float32)
            some = unit_scores(hidden[:, num_text:], is_probe)
            return y, jax.lax.dynamic_update_slice_in_dim(scores, some, start, axis=1)

        nothing = jnp.zeros((2, batch, num_text, width // 2), jnp.float32)
        no_scores = jnp.zeros((batch, self.number), jnp.float32)
        y, scores = jax.lax.fori_loop(0, self.number // size, add_part, (nothing, no_scores))
        return jnp.moveaxis(y, 0, 2).reshape(batch, num_text, width).astype(x.dtype), scores

    def _part(self, start: int | Array, size: int) -> list[Array]:
        """Gate, up and down of some of the layer's units, [size, 2, D / 2], in the order in memory that the stack has.

        Were the order left to XLA, it would take the one that its products like best, and copy the whole stack into it first.
        """
        at, shape = (self.layer, start, 0, 0), (1, size, *self.stack.gate.shape[2:])
        return [
            with_layout_constraint(jax.lax.dynamic_slice(matrix, at, shape)[0], Layout((0, 1, 2)))
            for matrix in (self.stack.gate, self.stack.up, self.stack.down)
        ]

    def through_rows(
        self, x: Float[Array, "B P D"], rows: Int[Array, "B own"], num_units: int
    ) -> Float[Array, "B P D"]:
        """As the protocol says, in bfloat16."""
        stack = jax.tree.map(lambda matrix: matrix.reshape(-1, *matrix.shape[2:]), self.stack)
        usual = num_units // num_shards()

        def through(x: Array, rows: Array) -> Array:
            count = (rows < self.number).sum(axis=1)
            rows = self.layer * self.number + jnp.minimum(rows, self.number - 1)
            return fetched_ffn(x, stack.gate, stack.up, stack.down, rows, count, usual)

        capacity = shard_capacity(num_units, num_shards(), HEADROOM)
        return in_tiles(x, rows, self.number, capacity, through)


def part_size(num_units: int, most: int) -> int:
    """The most units, up to `most`, that divide all of them."""
    return next(size for size in range(max(1, most), 0, -1) if num_units % size == 0)
