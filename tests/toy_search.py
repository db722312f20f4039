"""The slow twin of an evaluator that scores a round at once."""

from collections.abc import Callable

from rlens_jax.plan import Plan
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import ScoreRound


def one_at_a_time(score_plan: Callable[[Plan], PlanScore]) -> ScoreRound:
    """Score each plan by itself, without using the base."""
    return lambda base, candidates: [score_plan(plan) for plan in candidates]
