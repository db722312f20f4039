"""A Pallas TPU kernel for the reduced FFN that reads only the chosen units' rows from HBM.

XLA's own gather first copies the whole matrix on chip, so it saves arithmetic but no weight traffic. Here each row is fetched by
a DMA of its own into VMEM and used there; a gathered matrix never exists in HBM.

A TPU keeps two bfloat16 numbers in a word, of neighbouring *rows*, so one row of a [R, D] matrix cannot be fetched without the
other. The weights are therefore kept as [R, 2, D / 2]: the two halves of a unit share the words and a unit is one contiguous
piece of memory (our decision; ops/stored_units.py has the products of all units with that form).

Rows are fetched for the first block of tokens, tile by tile, the next tile on its way while one is multiplied, and stay in VMEM
for the other blocks.

Axis letters: B batch, P visual tokens, D width, R rows of the weights (units of all layers), C chosen rows.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Int

TILE = 128
"""Rows that are fetched and multiplied at a time."""
BLOCK = 256
"""Tokens that are in VMEM at a time."""
MOST_BYTES = 36 << 20
"""Chosen rows that stay in VMEM; more are taken in several passes."""
VMEM_LIMIT = 60 << 20
"""What the kernel may use; v5e and v6e have 128 MiB, v5p 64."""
DEVICES = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")
"""What it was compiled for; JAX has two names for each."""


def fetches(num_rows: int, width: int, dtype: DTypeLike, device_kind: str) -> bool:
    """Whether a chip's [num_rows, width] matrices of a layer should be kept for the kernel, as [num_rows, 2, width / 2]."""
    whole_tiles = num_rows % 16 == 0 and width % 256 == 0
    return whole_tiles and jnp.dtype(dtype) == jnp.bfloat16 and device_kind in DEVICES


def fetched_ffn(
    x: BFloat16[Array, "B P D"],
    gate: BFloat16[Array, "R 2 half"],
    up: BFloat16[Array, "R 2 half"],
    down: BFloat16[Array, "R 2 half"],
    rows: Int[Array, "B C"],
    count: Int[Array, " B"],
    usual: int,
) -> BFloat16[Array, "B P D"]:
    """Every sample's tokens through the first `count` of its `rows`, summed in float32; on a TPU (or, in tests, under
    `pltpu.force_tpu_interpret_mode`).

    Args:
        x: the tokens.
        gate, up, down: stay in HBM. Stacked layers are one matrix: layer * F + unit is a row.
        rows: all must exist, also those past `count`.
        count: rows past it add nothing, and tiles past it are not fetched.
        usual: what `count` is said to be in the cost that the kernel declares.
    """
    passes = math.ceil(rows.shape[1] * 6 * x.shape[2] / MOST_BYTES)
    share = math.ceil(rows.shape[1] / passes / TILE) * TILE
    rows = jnp.pad(rows, ((0, 0), (0, passes * share - rows.shape[1])))
    parts = []
    for start in range(0, passes * share, share):
        left, declared = jnp.clip(count - start, 0, share), min(max(usual - start, 0), share)
        parts.append(_one_pass(x, gate, up, down, rows[:, start : start + share], left, declared))
    return sum(parts[1:], parts[0])


def _one_pass(x: Array, gate: Array, up: Array, down: Array, rows: Array, count: Array, usual: int) -> Array:
    batch, tokens, width = x.shape
    most, computed = rows.shape[1], math.ceil(usual / TILE) * TILE
    block = min(BLOCK, math.ceil(tokens / 16) * 16)
    token_block = pl.BlockSpec((1, block, width), lambda b, p, rows, count: (b, p, 0))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(tokens, block)),
            in_specs=[token_block, in_place, in_place, in_place],
            out_specs=token_block,
            scratch_shapes=[
                pltpu.VMEM((2, 3, TILE, 2, width // 2), x.dtype),
                pltpu.VMEM((3, most, width), x.dtype),
                pltpu.VMEM((block, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * batch * tokens * computed * width,
            transcendentals=batch * tokens * computed,
            bytes_accessed=2 * batch * width * (3 * computed + 2 * tokens),
        ),
        name="fetched_ffn",
    )(rows.reshape(-1), count, x, gate, up, down)


def _kernel(rows, count, x, gate, up, down, y, fetched, chosen, total, arrived):  # type: ignore[no-untyped-def]
    """One block of tokens of one sample; `fetched` takes turns, `chosen` keeps what the sample's first block fetched."""
    sample, first_block = pl.program_id(0), pl.program_id(1) == 0
    most, width = chosen.shape[1:]
    tiles = pl.cdiv(count[sample], TILE)
    matrices = (gate, up, down)

    def start(tile: Array) -> None:
        slot = jax.lax.rem(tile, 2)

        def start_row(i: Array, _: None) -> None:
            row = rows[sample * most + tile * TILE + i]
            for k, matrix in enumerate(matrices):
                pltpu.make_async_copy(matrix.at[row], fetched.at[slot, k, i], arrived.at[slot]).start()

        jax.lax.fori_loop(0, TILE, start_row, None)

    def finish(tile: Array) -> None:
        """Waits for a tile's rows and lays their halves side by side."""
        slot = jax.lax.rem(tile, 2)
        at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        for k, matrix in enumerate(matrices):
            whole_tile = fetched.at[slot, k]  # a wait counts bytes
            pltpu.make_async_copy(matrix.at[pl.ds(0, TILE)], whole_tile, arrived.at[slot]).wait()
        for k in range(3):
            chosen[k, at, : width // 2] = fetched[slot, k, :, 0, :]
            chosen[k, at, width // 2 :] = fetched[slot, k, :, 1, :]

    def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        # Exact for bfloat16, whatever precision the run asks of products of float32.
        exact = jax.lax.Precision.DEFAULT
        return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)

    def add_tile(tile: Array, _: None) -> None:
        @pl.when(first_block)
        def _fetch() -> None:
            @pl.when(tile + 1 < tiles)
            def _next() -> None:
                start(tile + 1)

            finish(tile)

        at = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        hidden = jax.nn.silu(product(x[0], chosen[0, at], (1, 1))) * product(x[0], chosen[1, at], (1, 1))
        number = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
        hidden = jnp.where(number < count[sample], hidden, 0.0).astype(x.dtype)
        total[...] += product(hidden, chosen[2, at], (1, 0))

    @pl.when(first_block & (tiles > 0))
    def _begin() -> None:
        start(jnp.int32(0))

    total[...] = jnp.zeros_like(total)
    jax.lax.fori_loop(0, tiles, add_tile, None)
    y[0] = total[...].astype(y.dtype)
