"""Times of the two ways of visual tokens through their kept FFN units, beside the way that a GPU takes by arithmetic."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.engine.timing import deciding_seconds, time_turns, warm_up
from rlens_jax.flops import DecoderSizes
from rlens_jax.ops.ffn import FfnWay, FfnWeights, suited_way
from rlens_jax.plans import Reduction

VISUAL_TOKENS, BATCHES = (64, 128, 256, 512), (1, 2, 8)
REPEATS = 5


@dataclass(frozen=True)
class WayTimes:
    """Seconds of each way for `batch` samples of `visual_tokens`, and the way that is taken."""

    visual_tokens: int
    batch: int
    gathered: float
    masked: float
    taken: FfnWay


def time_ways(
    sizes: DecoderSizes, visual_tokens: Sequence[int], batches: Sequence[int], dtype: str, deadline: float
) -> list[WayTimes]:
    """Times for each number of visual tokens and samples, until the `deadline` of `time.monotonic`."""
    units, kept = sizes.ffn_width, Reduction().kept_units(sizes.ffn_width)
    rng = np.random.default_rng(0)
    found: list[WayTimes] = []
    keys = jax.random.split(jax.random.key(0), 3)
    weights = FfnWeights(*(jax.random.normal(key, (units, sizes.width), dtype) * sizes.width**-0.5 for key in keys))
    # The weights are arguments, not constants of the programs.
    gathered: Any = jax.jit(lambda weights, x, rows: weights.through_gathered(x, rows, kept))
    masked: Any = jax.jit(lambda weights, x, rows: weights.through_masked(x, rows))
    for batch in batches:
        rows = jnp.asarray(np.sort([rng.permutation(units)[:kept] for _ in range(batch)]), jnp.int32)
        for tokens in visual_tokens:
            if time.monotonic() > deadline:
                return found
            x = jax.random.normal(jax.random.key(1), (batch, tokens, sizes.width), dtype)
            calls = [partial(way, weights, x, rows) for way in (gathered, masked)]
            warm_up(calls)
            own, all_units = (deciding_seconds(turns) for turns in time_turns(calls, REPEATS))
            found.append(WayTimes(tokens, batch, own, all_units, suited_way(batch, tokens, units, kept)))
    return found
