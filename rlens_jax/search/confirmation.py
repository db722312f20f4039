"""Confirmation of a path's loss on held-out samples, which the search never saw.

The milestones of a path are fixed before any held-out sample is evaluated. They are tested one after another, least reduced
first, until one fails; the last one that passed is published. In this fixed sequence, the chance to publish a plan that breaks
the budget stays at 5 %, however many milestones there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlens_jax.search.bootstrap import bootstrap_interval
from rlens_jax.search.joint import Path, PathPoint

CONFIDENCE = 0.95
MILESTONE = 0.05
"""Cost between two milestones, as a share of the dense cost."""


def milestones(path: Path, step: float = MILESTONE) -> tuple[PathPoint, ...]:
    """The first point at or below each of the costs 1 - step, 1 - 2 step, ..., and the last point; each once."""
    chosen: list[PathPoint] = []
    for point in path.points[1:]:
        passed = math.floor((1 - point.cost) / step + 1e-9)
        before = math.floor((1 - chosen[-1].cost) / step + 1e-9) if chosen else 0
        if passed > before or point is path.points[-1]:
            chosen.append(point)
    return tuple(chosen)


def least_samples(loss: float) -> int:
    """The number of independent samples without which no plan can be confirmed: even one that changes no answer might lose more.

    With n samples of which none is lost, the share that is lost has the one-sided 95 % upper bound 1 - 0.05 ** (1 / n).
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - loss) - 1e-9)


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of a plan and its one-sided 95 % upper bound."""

    value: float
    bound: float


def held_out_losses(
    outcomes: Sequence[Mapping[str, np.ndarray]],
    dense: Mapping[str, np.ndarray],
    images: Mapping[str, np.ndarray],
    *,
    relative: bool,
    samples: int,
    seed: int,
) -> list[HeldOutLoss]:
    """The losses of some plans against the dense model, by a paired bootstrap.

    Args:
        outcomes: of each plan, per dataset float64[samples].
        dense: of the dense model.
        images: as in `bootstrap_interval`.
        relative: whether a dataset's loss is relative to the dense metric of all samples, which is not drawn.
        samples, seed: of the bootstrap.
    """
    table = {name: np.stack([dense[name], *(each[name] for each in outcomes)]) for name in dense}

    unit = np.array([values.mean() if relative else 1.0 for values in dense.values()])

    def losses(metrics: np.ndarray) -> np.ndarray:
        return ((metrics[:, :1] - metrics[:, 1:]) / unit).mean(axis=-1)

    interval = bootstrap_interval(table, losses, images=images, samples=samples, seed=seed, level=2 * CONFIDENCE - 1)
    return [HeldOutLoss(float(value), float(high)) for value, high in zip(interval.value, interval.high, strict=True)]


def last_confirmed(losses: Sequence[HeldOutLoss], budget: float) -> int:
    """How many of the milestones, from the first on, are confirmed before the first failure."""
    failures = [number for number, loss in enumerate(losses) if loss.bound > budget]
    return failures[0] if failures else len(losses)
