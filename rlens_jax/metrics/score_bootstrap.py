"""How sure a dataset's score is: percentile bootstrap over its groups of rows.

One draw takes, in every stratum, as many groups as it has, with replacement, and computes the dataset's score
of them by its own formula: MME's acc+ and HallusionBench's fAcc are no means over rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlens_jax.metrics.score import Score


@dataclass(frozen=True)
class Interval:
    """Bounds of a score, in its unit."""

    low: float
    high: float


def bootstrap_scores(score: Score, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """The dataset's score in each draw: float64[samples].

    The draws depend on the seed and on which groups there are in which order, not on what was answered. So the
    scores of two models on the same rows are of the same questions draw by draw, and the interval of their
    difference is that of the difference of these arrays.
    """
    groups_of: dict[str, dict[str, None]] = {}
    for group, stratum in zip(score.groups, score.strata, strict=True):
        groups_of.setdefault(stratum, {})[group] = None
    draw = np.random.default_rng(seed)
    # How often each group is drawn is all that a ratio depends on.
    counts = np.concatenate(
        [
            draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
            for names in groups_of.values()
        ],
        axis=1,
    ).astype(np.float64)
    column = {group: number for number, group in enumerate(group for names in groups_of.values() for group in names)}

    def drawn(sums: Mapping[str, float]) -> np.ndarray:
        """The sum over the groups of a draw: float64[samples]."""
        return counts[:, [column[group] for group in sums]] @ np.fromiter(sums.values(), np.float64)

    return np.sum([ratio.scale * drawn(ratio.numerators) / drawn(ratio.denominators) for ratio in score.ratios], axis=0)


def bootstrap_interval(score: Score, *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """The percentile interval of a dataset's score.

    Args:
      score: of `scorers.score`.
      samples: how many draws.
      seed: of the draws.
      level: the interval's coverage.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(bootstrap_scores(score, samples=samples, seed=seed), [tail, 1 - tail])
    return Interval(float(low), float(high))
