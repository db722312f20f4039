"""The search's question to an evaluator: the scores of a round's candidates on the samples of a split."""

from collections.abc import Mapping

from rlens_jax.engine.evaluator import Evaluator, Outcomes
from rlens_jax.plan import Plan
from rlens_jax.search.objective import PlanScore, dataset_metric, score_plan
from rlens_jax.search.search import ScoreRound


def metrics_of(outcomes: Outcomes) -> dict[str, float]:
    """Each dataset's metric."""
    return {name: dataset_metric(values.tolist()) for name, values in outcomes.items()}


def round_scorer(
    evaluator: Evaluator, split: str, dense: Mapping[str, float], *, alpha: float, relative: bool
) -> ScoreRound:
    """What `rank_layers` is given.

    Args:
        evaluator: evaluates the plans.
        split: on whose samples.
        dense: the dense model's metrics on them.
        alpha: how much more a drop weighs than a gain.
        relative: whether changes are relative to the dense metrics.
    """

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        scored = evaluator.outcomes(split, base, candidates)
        return [score_plan(metrics_of(outcomes), dense, alpha=alpha, relative=relative) for outcomes in scored]

    return score_round


def num_evaluations(num_layers: int, position_layers: int) -> int:
    """Evaluations of one search on each dataset, those of the base and of the prefixes included."""
    searched = num_layers - position_layers
    return searched * (searched + 1) // 2 + position_layers + 1
