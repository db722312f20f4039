"""How good a plan is: from per-sample outcomes to one score against the dense model.

Sums are exactly rounded (`math.fsum`), so that no order of samples, batches or datasets can change a score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlens_jax.errors import UserError

Metrics = Mapping[str, float]
"""Dataset -> metric."""

RIGHT = 1.0
"""The outcome of a sample whose answer is right."""


@dataclass(frozen=True)
class PlanScore:
    """The score of one plan.

    Attributes:
        score: the search's objective, higher is better; 0 for the dense model.
        loss: minus the mean change over the datasets, without the penalty; what reports show.
        metrics: the plan's metric on each dataset.
        bound: whether the plan was dropped before it was evaluated on all samples. Then score and metrics are upper bounds, and
            the loss is a lower bound.
    """

    score: float
    loss: float
    metrics: Metrics
    bound: bool = False


def dataset_metric(outcomes: Sequence[float] | np.ndarray) -> float:
    """The metric of a dataset: the mean of its per-sample outcomes (a pair or group is one sample)."""
    if not len(outcomes):
        raise ValueError("a dataset without outcomes has no metric")
    return math.fsum(outcomes) / len(outcomes)


def dataset_metrics(outcomes: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, float]:
    """The metric of each dataset."""
    return {name: dataset_metric(values) for name, values in outcomes.items()}


def relative_changes(metrics: Metrics, dense_metrics: Metrics, *, relative: bool = True) -> dict[str, float]:
    """delta_d, the change of each dataset's metric against the dense model's.

    Relative to the dense metric by default, so that metrics of different scales can be added (our decision); with
    `relative=False` the plain difference.

    Raises:
        UserError: the dense model scores 0, so there is no relative change.
        ValueError: the two do not cover the same datasets.
    """
    if metrics.keys() != dense_metrics.keys():
        raise ValueError(f"metrics of {sorted(metrics)}, but dense metrics of {sorted(dense_metrics)}")
    if not relative:
        return {name: metrics[name] - dense for name, dense in dense_metrics.items()}
    for name, dense in dense_metrics.items():
        if dense == 0:
            raise UserError(
                f"dataset {name}: the dense model scores 0, so no relative change is defined; "
                "leave the dataset out, or set search.change to absolute"
            )
    return {name: (metrics[name] - dense) / dense for name, dense in dense_metrics.items()}


def phi(change: float, alpha: float = 2.0) -> float:
    """A dataset's contribution: a gain counts once, a drop `alpha` times (paper: doubled)."""
    return change if change >= 0 else alpha * change


def plan_loss(metrics: Metrics, dense_metrics: Metrics, *, relative: bool = True) -> float:
    """The loss of a plan in reports: minus the mean change, without penalty. Errors as of `relative_changes`."""
    changes = relative_changes(metrics, dense_metrics, relative=relative)
    return 0.0 - math.fsum(changes.values()) / len(changes)


def score_plan(metrics: Metrics, dense_metrics: Metrics, *, alpha: float = 2.0, relative: bool = True) -> PlanScore:
    """A plan's score (the sum of `phi` over the datasets) and loss. Errors as of `relative_changes`."""
    changes = relative_changes(metrics, dense_metrics, relative=relative)
    score = math.fsum(phi(change, alpha) for change in changes.values())
    return PlanScore(score, plan_loss(metrics, dense_metrics, relative=relative), dict(metrics))


def score_outcomes(
    outcomes: Mapping[str, np.ndarray], dense_metrics: Metrics, *, alpha: float = 2.0, relative: bool = True, best: float = RIGHT
) -> PlanScore:
    """The score of a plan from the outcomes of each dataset: its bound if some are NaN, which count as `best`.

    No sample has an outcome above `best`, and neither a metric nor `phi` falls if a sample's outcome rises; so the bound is one.
    Errors as of `relative_changes`.
    """
    bound = any(np.isnan(values).any() for values in outcomes.values())
    known = {name: np.nan_to_num(values, nan=best).tolist() for name, values in outcomes.items()}
    return replace(score_plan(dataset_metrics(known), dense_metrics, alpha=alpha, relative=relative), bound=bound)


def comparable(score: float) -> float:
    """The score in comparisons: rounded to 12 digits, so that rounding errors break no tie."""
    if not math.isfinite(score):
        raise ValueError(f"a plan scored {score}")
    return round(score, 12)
