"""Measured time of a plan against the dense model: static programs, as a deployed model would run them, side by side.

Only the decoder's prefill is timed (the vision tower is the same on both sides), up to the logits of the last token.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.programs import Programs
from rlens_jax.plan import Plan


def time_side_by_side(functions: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each function's repeats; they take turns, so that a slow moment of the machine meets all of them.

    Each function is called once before, so that nothing is compiled while it is timed.
    """
    for function in functions:
        jax.block_until_ready(function())
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for place, function in enumerate(functions):
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[place].append(time.perf_counter() - began)
    return [tuple(measured) for measured in seconds]


def time_plan(
    programs: Programs, batch: Batch, plan: Plan, *, repeats: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of the prefill of one batch, dense and under `plan`, both compiled for their plan alone."""
    compiled = [programs.static_prefill(static) for static in (Plan(), plan)]
    visual = programs.put(batch.visual)
    calls = [partial(prefill, visual, batch.inputs) for prefill in compiled]
    dense, reduced = time_side_by_side(calls, repeats)
    return dense, reduced
