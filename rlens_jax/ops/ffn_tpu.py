"""The Dynamic FFN on a TPU: units stored as half rows, and a Pallas kernel that reads only the chosen ones from HBM.

XLA's gather first copies the whole matrix on chip, so it saves arithmetic but no weight traffic. The kernel fetches each row by
its own DMA into VMEM and uses it there; a gathered matrix never exists in HBM. It fetches rows for the first block of tokens,
tile by tile, while it multiplies the tile before, and they stay in VMEM for the other blocks.

A TPU packs two bfloat16 numbers of neighbouring *rows* into a word, so one row of a [F, D] matrix cannot be fetched alone. The
weights of all layers are therefore stored as one [L, F, 2, D / 2] array per matrix: the two halves of a unit share the words,
and a unit is one contiguous piece of memory (our decision). The kernel reads from the whole stack, because XLA would copy a
layer's slice for it.

XLA's own products read this form without a copy in HBM only in parts. A pass of a few thousand tokens over all units is
therefore a loop of parts, each cut out of the stack into VMEM. It reads every weight once, on v5e, v5p and v6e and on any
number of shards (benchmarks/weight_traffic.py).
"""

import math
from collections.abc import Sequence
from dataclasses import field

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.config import FfnPath
from rlens_jax.errors import UserError
from rlens_jax.ops.ffn import FfnWeights, hidden_units, in_tiles, shard_capacity, unit_scores
from rlens_jax.ops.ffn_paths import BLOCK, FETCHED, Ways
from rlens_jax.pytrees import pytree
from rlens_jax.sharding.mesh import FfnForm
from rlens_jax.sharding.model_axis import num_shards

PART_BYTES = 17 << 20
"""Max bytes of each matrix per part of a pass over all units. v5p, with the least VMEM, holds three parts."""
MAX_TOKENS = 4096
"""Max tokens of all samples in a pass over parts. The sums of more tokens do not stay in VMEM between parts, and moving them
costs more than a copy of the weights, which is then small compared with the tokens (the dry run's HBM traffic shows both)."""
HEADROOM = 1.5
"""Capacity of a shard for chosen units, relative to its even share. The kernel fetches and computes only the units there are,
so capacity costs only VMEM. The loop for more runs if units are very unevenly spread."""
TILE = 128
"""Rows fetched and multiplied at a time."""
MAX_ROW_BYTES = 36 << 20
"""Max bytes of chosen rows in VMEM; more rows are processed in several passes."""
VMEM_LIMIT = 60 << 20
"""VMEM that the kernel may use. v5e and v6e have 128 MiB, v5p has 64."""
DEVICE_KINDS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")
"""Devices for which the kernel was compiled; JAX has two names for each."""


def suited_form(num_units: int, width: int, dtype: DTypeLike, device_kind: str, path: FfnPath = "auto") -> FfnForm:
    """The form in which a device should store its units of a layer: "halves" where the kernel can and may fetch them.

    Raises:
        UserError: the path is the kernel, which cannot.
    """
    whole_tiles = num_units % 16 == 0 and width % 256 == 0
    fetched = whole_tiles and jnp.dtype(dtype) == jnp.bfloat16 and device_kind in DEVICE_KINDS
    if path == "kernel" and not fetched:
        raise UserError(
            "the FFN path kernel needs a TPU v5e, v5p or v6e, bfloat16, and on each device a multiple of 16 FFN units of a "
            f"width that 256 divides; here are {num_units} units of width {width} in {jnp.dtype(dtype)} on a {device_kind}; "
            "choose auto, gathered or masked"
        )
    return "halves" if fetched and path in ("auto", "kernel") else "rows"


@pytree
class HalvedStack:
    """The three FFN matrices of all layers that are stored so, each unit's row in two halves."""

    gate: Float[Array, "stored F 2 half"]
    up: Float[Array, "stored F 2 half"]
    down: Float[Array, "stored F 2 half"]
    places: tuple[int, ...] = field(default=(), kw_only=True, metadata={"static": True})
    """Where each layer is in the stack; empty if all layers are there."""

    def place(self, layer: Int[Array, ""]) -> Int[Array, ""]:
        """Where layer number `layer` is."""
        return jnp.asarray(self.places, jnp.int32)[layer] if self.places else layer

    @property
    def matrices(self) -> tuple[Array, Array, Array]:
        return self.gate, self.up, self.down


@pytree
class HalvedUnits:
    """One layer's `rlens_jax.ops.ffn.Units` in the stack of all layers."""

    stack: HalvedStack
    layer: Int[Array, ""]
    ways: Ways = field(default=FETCHED, kw_only=True, metadata={"static": True})

    @property
    def number(self) -> int:
        return self.stack.gate.shape[1]

    def through_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.text_and_scores(x, is_probe=jnp.zeros((x.shape[0], 0), bool))[0]

    def text_and_scores(
        self, x: Float[Array, "B XM D"], is_probe: Bool[Array, "B M"]
    ) -> tuple[Float[Array, "B X D"], Float[Array, "B F"]]:
        if x.shape[0] * x.shape[1] > MAX_TOKENS:
            return self._rows().text_and_scores(x, is_probe)
        return self._in_parts(x, is_probe)

    def scores(self, probes: Float[Array, "B M D"], is_probe: Bool[Array, "B M"], chunk: int) -> Float[Array, "B F"]:
        if probes.shape[0] * probes.shape[1] > MAX_TOKENS or probes.shape[1] > chunk:
            return self._rows().scores(probes, is_probe, chunk)
        return self._in_parts(probes, is_probe)[1]

    def through_rows(self, x: Float[Array, "B P D"], rows: Int[Array, "B rows"], num_units: int) -> Float[Array, "B P D"]:
        """As in the protocol; bfloat16 only."""
        matrices = [matrix.reshape(-1, *matrix.shape[2:]) for matrix in self.stack.matrices]
        typical = num_units // num_shards()

        def through(x: Array, rows: Array) -> Array:
            count = (rows < self.number).sum(axis=1)
            rows = self.layer * self.number + jnp.minimum(rows, self.number - 1)
            return fetched_ffn(x, matrices, rows, count, typical)

        return in_tiles(x, rows, self.number, shard_capacity(num_units, num_shards(), HEADROOM), through)

    def hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        if x.shape[0] * x.shape[1] > MAX_TOKENS:
            return hidden_units(x, self._rows())
        halves, size = self._halves(x), self._size(x)

        def add_part(i: Array, hidden: Array) -> Array:
            part = self._hidden_part(halves, i * size, size)
            return jax.lax.dynamic_update_slice_in_dim(hidden, part, i * size, axis=2)

        return jax.lax.fori_loop(0, self.number // size, add_part, jnp.zeros((*x.shape[:2], self.number), x.dtype))

    def output(self, hidden: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Summed over parts of the units in float32."""
        if hidden.shape[0] * hidden.shape[1] > MAX_TOKENS:
            return self._rows().output(hidden)
        size = self._size(hidden)

        def add_part(i: Array, y: Array) -> Array:
            return y + self._output_part(jax.lax.dynamic_slice_in_dim(hidden, i * size, size, axis=2), i * size, size)

        no_output = jnp.zeros((2, *hidden.shape[:2], self.stack.down.shape[-1]), jnp.float32)
        return self._whole(jax.lax.fori_loop(0, self.number // size, add_part, no_output), hidden.dtype)

    def _rows(self) -> FfnWeights:
        """A copy of the layer's units as [F, D]."""
        return FfnWeights(*(self._part(matrix, 0, self.number).reshape(self.number, -1) for matrix in self.stack.matrices))

    def _in_parts(self, x: Array, is_probe: Array) -> tuple[Array, Array]:
        """`text_and_scores`, one part of the units at a time; the text's output is summed over the parts in float32."""
        batch, tokens, width = x.shape
        num_text, size, halves = tokens - is_probe.shape[1], self._size(x), self._halves(x)

        def add_part(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            y, scores = carry
            start = i * size
            hidden = self._hidden_part(halves, start, size)
            y += self._output_part(hidden[:, :num_text], start, size)
            part_scores = unit_scores(hidden[:, num_text:], is_probe)
            return y, jax.lax.dynamic_update_slice_in_dim(scores, part_scores, start, axis=1)

        no_output = jnp.zeros((2, batch, num_text, width // 2), jnp.float32)
        no_scores = jnp.zeros((batch, self.number), jnp.float32)
        y, scores = jax.lax.fori_loop(0, self.number // size, add_part, (no_output, no_scores))
        return self._whole(y, x.dtype), scores

    def _size(self, x: Array) -> int:
        """Units of a part, for numbers of the type of `x`."""
        # At least two parts: XLA unrolls a loop of one step, and then copies the whole matrix in HBM.
        width = 2 * self.stack.gate.shape[-1]
        return part_size(self.number, min(PART_BYTES // (width * x.dtype.itemsize), self.number // 2))

    def _halves(self, x: Float[Array, "B T D"]) -> Float[Array, "2 B T half"]:
        return jnp.moveaxis(x.reshape(*x.shape[:2], 2, x.shape[2] // 2), 2, 0)

    def _whole(self, y: Float[Array, "2 B T half"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        return jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], 2 * y.shape[3]).astype(dtype)

    def _hidden_part(self, halves: Array, start: Array, size: int) -> Array:
        gate, up = (self._part(matrix, start, size) for matrix in (self.stack.gate, self.stack.up))
        gated, linear = (jnp.einsum("kbtd,fkd->btf", halves, matrix) for matrix in (gate, up))
        return jax.nn.silu(gated) * linear

    def _output_part(self, hidden: Array, start: Array, size: int) -> Array:
        down = self._part(self.stack.down, start, size)
        return jnp.einsum("btf,fkd->kbtd", hidden, down, preferred_element_type=jnp.float32)

    def _part(self, matrix: Float[Array, "L F 2 half"], start: int | Array, size: int) -> Float[Array, "size 2 half"]:
        """Some of the layer's units in the memory order of the stack.

        If XLA chose the order, it would choose the best one for its products and copy the whole stack into it first.
        """
        at, shape = (self.layer, start, 0, 0), (1, size, *matrix.shape[2:])
        return with_layout_constraint(jax.lax.dynamic_slice(matrix, at, shape)[0], Layout((0, 1, 2)))


def part_size(num_units: int, most: int) -> int:
    """The largest divisor of `num_units` that is at most `most`, or 1."""
    return next(size for size in range(max(1, most), 0, -1) if num_units % size == 0)


def fetched_ffn(
    x: Float[Array, "B P D"],
    matrices: Sequence[Float[Array, "LF 2 half"]],
    rows: Int[Array, "B rows"],
    count: Int[Array, " B"],
    typical: int,
) -> Float[Array, "B P D"]:
    """Each sample's tokens through the first `count` of its `rows`, summed in float32.

    It runs on a TPU in bfloat16, in tests also in float32 under `pltpu.force_tpu_interpret_mode`.

    Args:
        matrices: gate, up and down, which remain in HBM, each with rows layer * F + unit.
        rows: all must exist, also those past `count`.
        count: rows past it add nothing, and tiles past it are not fetched.
        typical: the `count` that the kernel's cost estimate assumes.
    """
    passes = math.ceil(rows.shape[1] * 6 * x.shape[2] / MAX_ROW_BYTES)
    share = math.ceil(rows.shape[1] / passes / TILE) * TILE
    rows = jnp.pad(rows, ((0, 0), (0, passes * share - rows.shape[1])))
    parts = []
    for start in range(0, passes * share, share):
        remaining, assumed = jnp.clip(count - start, 0, share), min(max(typical - start, 0), share)
        parts.append(_one_pass(x, matrices, rows[:, start : start + share], remaining, assumed))
    return sum(parts[1:], parts[0])


def _one_pass(x: Array, matrices: Sequence[Array], rows: Array, count: Array, typical: int) -> Array:
    """`fetched_ffn` for as many rows as VMEM holds."""
    batch, tokens, width = x.shape
    capacity, computed = rows.shape[1], math.ceil(typical / TILE) * TILE
    block = min(BLOCK, math.ceil(tokens / 16) * 16)
    token_block = pl.BlockSpec((1, block, width), lambda b, p, rows, count: (b, p, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(tokens, block)),
            in_specs=[token_block, in_hbm, in_hbm, in_hbm],
            out_specs=token_block,
            scratch_shapes=[
                pltpu.VMEM((2, 3, TILE, 2, width // 2), x.dtype),
                pltpu.VMEM((3, capacity, width), x.dtype),
                pltpu.VMEM((block, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            # All rows exist, and tiles are cut out of whole arrays. The checks take most of the instructions that start a fetch.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * batch * tokens * computed * width,
            transcendentals=batch * tokens * computed,
            bytes_accessed=2 * batch * width * (3 * computed + 2 * tokens),
        ),
        name="fetched_ffn",
    )(rows.reshape(-1), count, x, *matrices)


def _kernel(rows, count, x, gate, up, down, y, fetched, chosen, total, arrived):  # type: ignore[no-untyped-def]
    """One block of tokens of one sample.

    `fetched` is a double buffer of tiles. `chosen` keeps the rows that the sample's first block fetched.
    """
    sample, is_first_block = pl.program_id(0), pl.program_id(1) == 0
    tiles = pl.cdiv(count[sample], TILE)
    start, finish = _fetcher(sample, rows, (gate, up, down), fetched, chosen, arrived)

    def add_tile(tile: Array, _: None) -> None:
        @pl.when(is_first_block)
        def _fetch() -> None:
            @pl.when(tile + 1 < tiles)
            def _next() -> None:
                start(tile + 1)

            finish(tile)

        at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        hidden = jax.nn.silu(_product(x[0], chosen[0, at], (1, 1))) * _product(x[0], chosen[1, at], (1, 1))
        number = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
        hidden = jnp.where(number < count[sample], hidden, 0.0).astype(x.dtype)
        total[...] += _product(hidden, chosen[2, at], (1, 0))

    @pl.when(is_first_block & (tiles > 0))
    def _begin() -> None:
        start(jnp.int32(0))

    total[...] = jnp.zeros_like(total)
    jax.lax.fori_loop(0, tiles, add_tile, None)
    y[0] = total[...].astype(y.dtype)


def _fetcher(sample, rows, matrices, fetched, chosen, arrived):  # type: ignore[no-untyped-def]
    """Two functions of a tile's number: start to fetch its rows, and wait for them and join their halves in `chosen`."""
    capacity, width = chosen.shape[1:]

    def start(tile: Array) -> None:
        slot = jax.lax.rem(tile, 2)

        def start_row(i: Array, _: None) -> None:
            row = rows[sample * capacity + tile * TILE + i]
            for k, matrix in enumerate(matrices):
                pltpu.make_async_copy(matrix.at[row], fetched.at[slot, k, i], arrived.at[slot]).start()

        jax.lax.fori_loop(0, TILE, start_row, None)

    def finish(tile: Array) -> None:
        slot = jax.lax.rem(tile, 2)
        at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        for k, matrix in enumerate(matrices):
            whole_tile = fetched.at[slot, k]  # A wait counts bytes.
            pltpu.make_async_copy(matrix.at[pl.ds(0, TILE)], whole_tile, arrived.at[slot]).wait()
        for k in range(3):
            chosen[k, at, : width // 2] = fetched[slot, k, :, 0, :]
            chosen[k, at, width // 2 :] = fetched[slot, k, :, 1, :]

    return start, finish


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    # Exact for bfloat16, whatever precision is set for products of float32.
    exact = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)
