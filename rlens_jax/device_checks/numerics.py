"""Every fast path against the plain reference on this device, and the reference against values made on a CPU.

The inputs are small and the same everywhere. Pallas kernels for TPUs run as they are on a TPU, and interpreted on a CPU. cuDNN's
attention runs on an NVIDIA GPU, and its pieces in plain XLA on a CPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from rlens_jax.errors import UserError, foreign
from rlens_jax.files import json_text, read_json_object, replace_file
from rlens_jax.layout import Bucket, TokenLayout, Tokens, pack_layout
from rlens_jax.ops.attention import chunked_attention, packed_attention, reference_attention
from rlens_jax.ops.attention_gpu import cudnn_attention, refusal
from rlens_jax.ops.attention_tpu import splash_attention
from rlens_jax.ops.ffn import FfnWeights, Units, dense_ffn, dynamic_ffn, simulated_dynamic_ffn
from rlens_jax.ops.ffn_paths import MASKED
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits
from rlens_jax.plans import TEXT, Reduction

CPU_VALUES = Path(__file__).with_name("cpu_values.json")
HEADS, KV_HEADS, HEAD_DIM, WIDTH, UNITS = 4, 2, 128, 256, 512
BUCKET = Bucket(32, 160)
RUNS = ((5, 131, 17), (3, 61, 2, 40, 9), (20,))
"""Tokens of each row: text, visual, text, ..."""
RANGES = {"dense": None, "range 32": 32, "text only": TEXT}
REDUCTION = Reduction(attention_range=32)
CHUNK = 64
SHOWN = 48
"""Values of each reference that are compared with the CPU's."""
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative to max(1, largest value)."""

Against = Literal["reference", "cpu"]
CheckedKernel = Literal["splash", "fetched ffn", "cudnn"]


@dataclass(frozen=True)
class Check:
    """One fast path, or the plain reference, against what it must equal.

    Attributes:
        name: the path and what it computes.
        dtype: of its inputs.
        against: the plain reference on this device, or values made on a CPU.
        kernel: the kernel that was checked, Pallas' or cuDNN's; None for paths of plain XLA.
        interpreted: whether a Pallas kernel ran in Pallas' interpreter.
        difference: the largest, relative to max(1, largest value); None if the path failed.
        tolerance: the largest that passes.
        error: why the path failed, in one line.
    """

    name: str
    dtype: str
    against: Against
    kernel: CheckedKernel | None
    interpreted: bool
    difference: float | None
    tolerance: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance


def run_checks() -> list[Check]:
    """All checks that this device can run."""
    return list(_all_checks(read_json_object(CPU_VALUES)))


def write_cpu_values() -> None:
    """Write the shipped values again, on a CPU, after a change of the inputs here."""
    values = {name: sampled(value) for name, value in references().items()}
    replace_file(CPU_VALUES, json_text({name: value.tolist() for name, value in values.items()}).encode())


def references() -> dict[str, np.ndarray]:
    """The plain references in float32 on this device, by name."""
    q, k, v, x, layout = _inputs(jnp.float32)
    made: dict[str, Any] = {
        f"attention, {name}": jax.jit(partial(reference_attention, layout=layout, attention_range=reach))(q, k, v)
        for name, reach in RANGES.items()
    }
    made["ffn, dense"] = jax.jit(dense_ffn)(x, _weights(jnp.float32))
    made["ffn, dynamic"] = jax.jit(_simulated)(x, _weights(jnp.float32), layout)[0]
    return {name: np.where(_there(layout, value), value, 0) for name, value in made.items()}


def sampled(values: np.ndarray) -> np.ndarray:
    """`SHOWN` of the values, spread evenly, as float32."""
    flat = values.astype(np.float32).reshape(-1)
    return flat[:: len(flat) // SHOWN][:SHOWN]


def _all_checks(known: Mapping[str, Any]) -> Iterator[Check]:
    expected = references()
    for name, value in expected.items():
        against = np.array(known[name], np.float32)
        yield _compared(name, "float32", "cpu", None, lambda value=value: sampled(value), against)  # type: ignore[misc]
    for dtype in TOLERANCES:
        q, k, v, x, layout = _inputs(dtype)
        exact = [part.astype(jnp.float32) for part in (q, k, v)]
        for name, reach in RANGES.items():
            wanted = jax.jit(partial(reference_attention, layout=layout, attention_range=reach))(*exact)
            for path, kernel, attend in _attentions(dtype):
                run = jax.jit(partial(attend, layout=layout, attention_range=reach))
                yield _check(f"{path} attention, {name}", dtype, kernel, partial(run, q, k, v), layout, wanted)
        weights = _weights(dtype)
        wanted, kept = jax.jit(_simulated)(
            x.astype(jnp.float32), jax.tree.map(lambda part: part.astype(jnp.float32), weights), layout
        )
        for path, kernel, units, chunk in _ffns(weights, dtype):
            run = jax.jit(partial(_dynamic, chunk=chunk))
            yield _check(f"{path} dynamic FFN", dtype, kernel, partial(run, x, units, layout, kept.units), layout, wanted)


def _attentions(dtype: str) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    yield "packed", None, packed_attention
    yield "chunked", None, chunked_attention
    if jax.default_backend() == "cpu":
        yield "cuDNN's, in plain XLA,", None, cudnn_attention
    if jax.default_backend() == "gpu" and refusal(dtype, HEAD_DIM) is None:
        yield "cuDNN", "cudnn", cudnn_attention
    if _runs_kernels():
        yield "splash", "splash", partial(splash_attention, interpret=_interprets())


def _ffns(weights: FfnWeights, dtype: str) -> Iterator[tuple[str, Any, Units, int | None]]:
    yield "gathered", None, weights, None
    yield "gathered, chunked", None, weights, CHUNK
    yield "masked", None, replace(weights, ways=MASKED), None
    if dtype == "bfloat16" and _runs_kernels():
        stack = HalvedStack(*(part.reshape(1, UNITS, 2, WIDTH // 2) for part in (weights.gate, weights.up, weights.down)))
        yield "fetched", "fetched ffn", HalvedUnits(stack, jnp.int32(0)), None
        yield "masked half rows", None, HalvedUnits(stack, jnp.int32(0), ways=MASKED), None


def _check(name: str, dtype: str, kernel: Any, run: Callable[[], Any], layout: TokenLayout, wanted: Any) -> Check:
    there = _there(layout, wanted)
    expected = np.where(there, np.asarray(wanted, np.float32), 0)

    def computed() -> np.ndarray:
        with _interpreter(kernel):
            return np.where(there, np.asarray(run(), np.float32), 0)

    return _compared(name, dtype, "reference", kernel, computed, expected)


def _compared(
    name: str, dtype: str, against: Against, kernel: Any, compute: Callable[[], np.ndarray], expected: np.ndarray
) -> Check:
    check = partial(Check, name, dtype, against, kernel, kernel is not None and _interprets())
    try:
        with foreign(name):
            values = compute()
    except UserError as error:  # whatever the compiler or the device says
        return check(None, TOLERANCES[dtype], str(error))
    if not np.isfinite(values).all():
        return check(None, TOLERANCES[dtype], "some values are not finite")
    return check(float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max())), TOLERANCES[dtype])


def _dynamic(x: Any, units: Units, layout: TokenLayout, imposed: Any, chunk: int | None) -> Any:
    return dynamic_ffn(x, units, layout, REDUCTION, jax.random.key(0), imposed, chunk)[0]


def _simulated(x: Any, weights: FfnWeights, layout: TokenLayout) -> Any:
    return simulated_dynamic_ffn(x, weights, layout, REDUCTION, jax.random.key(0))


def _inputs(dtype: DTypeLike) -> tuple[Any, Any, Any, Any, TokenLayout]:
    """Queries, keys, values, states and layout."""
    draw, rows = np.random.default_rng(0), len(RUNS)
    shapes = [(rows, heads, BUCKET.slots, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jnp.asarray(draw.standard_normal(shape), dtype) for shape in (*shapes, (rows, BUCKET.slots, WIDTH))]
    kinds = [np.repeat(np.arange(len(runs)) % 2 == 1, runs) for runs in RUNS]
    layout = pack_layout([Tokens.sequence(is_visual) for is_visual in kinds], BUCKET, range(rows))
    return (*arrays, jax.tree.map(jnp.asarray, layout))


def _weights(dtype: DTypeLike) -> FfnWeights:
    draw = np.random.default_rng(1)
    return FfnWeights(*(jnp.asarray(draw.standard_normal((UNITS, WIDTH)) / WIDTH**0.5, dtype) for _ in range(3)))


def _there(layout: TokenLayout, values: Any) -> np.ndarray:
    """Where values [B, N, T, H] or [B, T, D] are those of tokens."""
    slots = np.arange(BUCKET.slots)
    text, visual = (np.asarray(count)[:, None] for count in (layout.num_text, layout.num_visual))
    there = np.where(slots < BUCKET.text, slots < text, slots - BUCKET.text < visual)
    return there[:, None, :, None] if np.ndim(values) == 4 else there[:, :, None]


def _interprets() -> bool:
    return jax.default_backend() == "cpu"


def _runs_kernels() -> bool:
    return jax.default_backend() in ("cpu", "tpu")


def _interpreter(kernel: Any) -> AbstractContextManager[Any]:
    return pltpu.force_tpu_interpret_mode() if kernel == "fetched ffn" and _interprets() else nullcontext()
