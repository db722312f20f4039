"""Measured time of a plan against the dense model: static programs, as a deployed model would run them, side by side.

Only the decoder's prefill is timed (the vision tower is the same on both sides), up to the logits of the last token.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from rlens_jax.models.generation import prefill
from rlens_jax.plan import Plan, Reduction
from rlens_jax.ranking.inputs import Batch


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
    model: Any, batch: Batch, plan: Plan, reduction: Reduction, *, seed: int, repeats: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of the prefill of one batch, dense and under `plan`, both compiled for their plan alone."""
    graph, state = nnx.split(model)

    def program(static: Plan) -> Callable[[], Any]:
        @jax.jit
        def run(state: Any, visual: Any, inputs: Any) -> Any:
            decoder = nnx.merge(graph, state).decoder
            return prefill(decoder, visual, inputs, static, reduction, 1, jax.random.key(seed))

        return lambda: run(state, batch.visual, batch.inputs)

    dense, reduced = time_side_by_side([program(Plan()), program(plan)], repeats)
    return dense, reduced
