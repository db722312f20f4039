"""Measured time of a plan against the dense model, side by side, in static programs as a deployed model runs them.

Only the decoder's prefill is timed, up to the logits of the last token. The vision tower is the same on both sides.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.model_programs import ROWS, Program
from rlens_jax.engine.programs import Programs
from rlens_jax.models.generation import prefill
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.plan import Plan
from rlens_jax.search.results import PrefillTime


def time_side_by_side(functions: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each function's repeats; they take turns, so that a slow moment of the machine hits all of them.

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


def time_plans(programs: Programs, batch: Batch, plans: Mapping[str, Plan], repeats: int) -> dict[str, PrefillTime]:
    """The times of one batch's prefill under each plan, each beside the dense prefill and compiled for its plan alone."""
    visual, bucket = programs.put(batch.visual), batch.inputs.layout.bucket
    times = {}
    for name, plan in plans.items():
        calls = [partial(_static_prefill(programs, static), visual, batch.inputs) for static in (Plan(), plan)]
        dense, reduced = time_side_by_side(calls, repeats)
        times[name] = PrefillTime(dense, reduced, len(batch.inputs.layout.sample), bucket.text, bucket.visual)
    return times


def _static_prefill(programs: Programs, plan: Plan) -> Program:
    """A prefill up to the first new token that is compiled for one plan alone."""

    def run(model: Any, visual: Array, batch: PromptBatch) -> Array:
        key = programs.random_key()
        return prefill(model.decoder, visual, batch, plan, programs.reduction, 1, key, programs.kernel)[0]

    return programs.program("static prefill", run, (ROWS, ROWS), ROWS)
