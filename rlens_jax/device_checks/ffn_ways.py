"""Times of the ways of a reduced FFN's visual tokens on this device, beside the way that it takes by arithmetic."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.config import FfnPath
from rlens_jax.engine.timing import TEXT_AFTER, TEXT_BEFORE, deciding_seconds, time_turns, warm_up
from rlens_jax.flops import DecoderSizes
from rlens_jax.layout import Bucket, Tokens, pack_layout
from rlens_jax.ops.ffn import FfnWeights, Units, dynamic_ffn
from rlens_jax.ops.ffn_paths import MASKED, FfnWay, Ways, Work, ways_on
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits, suited_form
from rlens_jax.plans import Reduction
from rlens_jax.sharding.mesh import FfnForm

VISUAL_TOKENS, BATCHES = (64, 128, 256, 512), (1, 2, 8)
REPEATS = 5


@dataclass(frozen=True)
class WayTimes:
    """Seconds of a reduced FFN by each way, for `batch` samples of `visual_tokens`, and the way that is taken."""

    visual_tokens: int
    batch: int
    seconds: dict[FfnWay, float]
    taken: FfnWay


def time_ways(
    sizes: DecoderSizes, visual_tokens: Sequence[int], batches: Sequence[int], dtype: str, ffn_path: FfnPath, deadline: float
) -> list[WayTimes]:
    """Times for each number of visual tokens and samples, until the `deadline` of `time.monotonic`.

    A way is timed in the form of the units that it reads: the kernel in halves, and the others in the form of the device. The
    kernel is left out if `ffn_path` is another one.
    """
    reduction, text = Reduction(), TEXT_BEFORE + TEXT_AFTER
    stored = dict(_stored(sizes, dtype, form_and_ways(sizes, dtype, ffn_path)[1]))
    program: Any = jax.jit(lambda units, x, layout: dynamic_ffn(x, units, layout, reduction, jax.random.key(0))[0])
    found: list[WayTimes] = []
    for batch in batches:
        for tokens in visual_tokens:
            if time.monotonic() > deadline:
                return found
            is_visual = np.arange(text + tokens) >= text
            layout = pack_layout([Tokens.sequence(is_visual)] * batch, Bucket(text, tokens), range(batch))
            x = jax.random.normal(jax.random.key(1), (batch, text + tokens, sizes.width), dtype)
            # The weights are arguments, not constants of the programs.
            calls = [partial(program, units, x, jax.tree.map(jnp.asarray, layout)) for units in stored.values()]
            warm_up(calls)
            seconds = map(deciding_seconds, time_turns(calls, REPEATS))
            taken = taken_way(sizes, batch, tokens, dtype, ffn_path)
            found.append(WayTimes(tokens, batch, dict(zip(stored, seconds, strict=True)), taken))
    return found


def taken_way(sizes: DecoderSizes, batch: int, visual_tokens: int, dtype: str, ffn_path: FfnPath) -> FfnWay:
    """The way that this device takes for `batch` samples of `visual_tokens`."""
    probes, kept = Reduction().probe_capacity(visual_tokens), Reduction().kept_units(sizes.ffn_width)
    work = Work(batch, TEXT_BEFORE + TEXT_AFTER, probes, visual_tokens, sizes.ffn_width, kept)
    return form_and_ways(sizes, dtype, ffn_path)[1].suited(work)


def form_and_ways(sizes: DecoderSizes, dtype: str, ffn_path: FfnPath) -> tuple[FfnForm, Ways]:
    """How this device stores the units of a reduced FFN, and the ways through them that it chooses from."""
    device = jax.devices()[0]
    form = suited_form(sizes.ffn_width, sizes.width, dtype, device.device_kind, ffn_path)
    return form, ways_on(device, form, dtype, ffn_path)


def _stored(sizes: DecoderSizes, dtype: str, ways: Ways) -> Iterator[tuple[FfnWay, Units]]:
    """Random units for each way: those that the device chooses from, and XLA's gather."""
    keys, shape = jax.random.split(jax.random.key(0), 3), (sizes.ffn_width, sizes.width)
    rows = [jax.random.normal(key, shape, dtype) * sizes.width**-0.5 for key in keys]
    yield "gathered", FfnWeights(*rows)
    if "kernel" in ways.possible:
        halved = HalvedUnits(HalvedStack(*(part.reshape(1, shape[0], 2, -1) for part in rows)), jnp.int32(0))
        yield "kernel", halved
        yield "masked", replace(halved, ways=MASKED)
    else:
        yield "masked", FfnWeights(*rows, ways=MASKED)
