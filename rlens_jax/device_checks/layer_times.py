"""Times of one decoder layer of a published model at each operator setting, beside what the dry run predicts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx

from rlens_jax.config import FfnPath
from rlens_jax.device_checks.ffn_ways import form_and_ways, taken_way
from rlens_jax.dry_run.costs import Cost
from rlens_jax.dry_run.estimate import roofline_seconds
from rlens_jax.dry_run.topology import CHIP_KINDS, Slice
from rlens_jax.engine.timing import TEXT_AFTER, TEXT_BEFORE, Turn, deciding_seconds, decoder_inputs, time_turns, warm_up
from rlens_jax.errors import UserError, foreign
from rlens_jax.flops import DecoderSizes, layer_cost
from rlens_jax.models.decoder import Context
from rlens_jax.ops.attention import Kernel
from rlens_jax.ops.ffn_paths import FfnWay
from rlens_jax.ops.ffn_tpu import HalvedStack
from rlens_jax.plans import FULL, SKIP, STANDARD, Level, Reduction

SETTINGS: dict[str, tuple[Level, Level]] = {
    "dense": (FULL, FULL),
    "attention": (STANDARD, FULL),
    "ffn": (FULL, STANDARD),
    "both": (STANDARD, STANDARD),
    "skip attention": (SKIP, FULL),
    "skip ffn": (FULL, SKIP),
    "freeze": (SKIP, SKIP),
}
"""Name -> levels of attention and FFN."""
MOST_REPEATS = 20
CHIPS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""JAX's name of a device kind -> its chip kind in the dry run."""


@dataclass(frozen=True)
class LayerTime:
    """A layer at one setting.

    Attributes:
        setting: its name in `SETTINGS`.
        turns: the repeats.
        flops: multiplications and additions by the usual formula, probes included.
        predicted: the dry run's seconds at peak rates, None for a device whose rates it does not know.
    """

    setting: str
    turns: tuple[Turn, ...]
    flops: int
    predicted: float | None

    @property
    def seconds(self) -> float:
        """The time that decides."""
        return deciding_seconds(self.turns)


@dataclass(frozen=True)
class LayerTimes:
    """All settings with a number of visual tokens; `left_out` says why there are no times."""

    visual_tokens: int
    kernel: Kernel
    ffn_way: FfnWay
    """Of visual tokens through the units that a layer keeps."""
    dtype: str
    times: tuple[LayerTime, ...]
    left_out: str | None = None


def time_settings(
    sizes: DecoderSizes,
    visual_tokens: Sequence[int],
    dtype: str,
    kernel: Kernel,
    ffn_path: FfnPath,
    deadline: float,
    note: Callable[[str], None],
) -> list[LayerTimes]:
    """Times for each number of visual tokens, in order; those that would end after the `deadline` are left out.

    Units are stored as a deployed model has them on this device: rows where all of them or none are used, and in the form of
    the kernel, if it has one, in a reduced FFN.

    Args:
        sizes: widths of the layer.
        visual_tokens: numbers of visual tokens, between 64 and 64 text tokens, ascending.
        dtype: of weights and states.
        kernel: of the attention.
        ffn_path: of a reduced FFN.
        deadline: a time of `time.monotonic`.
        note: is told what is being done.
    """
    found: list[LayerTimes] = []
    for count in visual_tokens:
        way = taken_way(sizes, 1, count, dtype, ffn_path)
        table, left = partial(LayerTimes, count, kernel, way, dtype), deadline - time.monotonic()
        expected = _expected(sizes, found, count)
        if found and expected > left:
            found.append(table((), f"would take about {expected:.0f} s, and {max(0, left):.0f} s are left"))
            continue
        note(f"timing a layer with {count} visual tokens")
        try:
            with foreign(f"{count} visual tokens"):
                found.append(table(tuple(_times(sizes, count, dtype, kernel, ffn_path, deadline))))
        except UserError as error:
            found.append(table((), str(error)))
    return found


def _expected(sizes: DecoderSizes, found: Sequence[LayerTimes], visual: int) -> float:
    """Seconds for all settings once, and once more for the first call, by the last times; 0 without any."""
    timed = [table for table in found if table.times]
    if not timed:
        return 0.0
    last = timed[-1]
    growth = _flops(sizes, visual, FULL, FULL) / _flops(sizes, last.visual_tokens, FULL, FULL)
    return 2 * growth * sum(min(turn.wall for turn in each.turns) for each in last.times)


def _times(sizes: DecoderSizes, visual: int, dtype: str, kernel: Kernel, ffn_path: FfnPath, deadline: float) -> list[LayerTime]:
    decoder, x, context, _ = decoder_inputs(sizes, 1, visual, dtype, kernel)
    layer, reduced = decoder.layer(0), context
    layer.ffn.form, layer.ffn.ways = form_and_ways(sizes, dtype, ffn_path)
    if layer.ffn.form == "halves":
        halves = (rows.reshape(1, rows.shape[0], 2, -1) for rows in layer.ffn.kernels)
        reduced = replace(context, halved=HalvedStack(*halves))
    graph, state = nnx.split(layer)

    def run(attention: Level, ffn: Level, state: Any, x: Any, context: Context) -> Any:
        return nnx.merge(graph, state)(x, context, Reduction(), attention, ffn, jax.numpy.int32(0))[0]

    inputs = [(state, x, reduced if ffn == STANDARD else context) for _, ffn in SETTINGS.values()]
    settings = [jax.jit(partial(run, *levels)) for levels in SETTINGS.values()]
    programs = [setting.lower(*given).compile() for setting, given in zip(settings, inputs, strict=True)]
    calls = [partial(program, *given) for program, given in zip(programs, inputs, strict=True)]
    warm_up(calls)
    first = time_turns(calls, 1)
    once = sum(turn.wall for (turn,) in first)
    repeats = min(MOST_REPEATS, int((deadline - time.monotonic()) / 2 / once))
    others = time_turns(calls, max(0, repeats - 1))
    return [
        LayerTime(name, (*one, *more), flops := _flops(sizes, visual, *levels), _predicted(flops, program))
        for (name, levels), one, more, program in zip(SETTINGS.items(), first, others, programs, strict=True)
    ]


def _flops(sizes: DecoderSizes, visual: int, attention: Level, ffn: Level) -> int:
    cost = partial(layer_cost, sizes.layer_sizes, TEXT_BEFORE + TEXT_AFTER, visual, Reduction(), with_probes=True)
    return 2 * cost(attention=attention, ffn=ffn)


def _predicted(flops: int, program: Any) -> float | None:
    chip = CHIPS.get(jax.devices()[0].device_kind)
    if chip is None:
        return None
    traffic = (program.cost_analysis() or {}).get("bytes accessed", 0.0)
    kind = CHIP_KINDS[chip]
    return roofline_seconds(Cost(flops, traffic), Slice(kind, (1,) * len(kind.shapes[0].split("x"))))
