"""How sure a measured curve is: percentile bootstrap over the samples of each dataset.

One draw takes, in every dataset, as many samples as it has, with replacement, and the same ones for all
points of a curve: points are compared on the same questions, so what they share cancels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps metrics float64[draws, points, datasets] to float64[draws] or float64[draws, points]."""


@dataclass(frozen=True)
class Interval:
    """A statistic of the data as they are, and the bounds of its interval: float64[points] or float64[]."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_interval(
    outcomes_by_dataset: Mapping[str, np.ndarray],
    statistic: Statistic,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The percentile interval of a statistic of a curve.

    Args:
      outcomes_by_dataset: per dataset, outcomes [points, samples of the dataset]; a pair or group is one
        sample. The draws depend on the order of the datasets.
      statistic: `mean_over_datasets`, `area_under_curve(...)`, or any other of that form.
      samples: how many draws.
      seed: of the draws.
      level: the interval's coverage.
    """
    outcomes = [np.asarray(values, np.float64) for values in outcomes_by_dataset.values()]
    draw = np.random.default_rng(seed)
    drawn = []
    for values in outcomes:
        size = values.shape[1]
        # How often each sample is drawn is all that a mean depends on.
        counts = draw.multinomial(size, np.full(size, 1 / size), size=samples)
        drawn.append(counts @ values.T / size)
    observed = np.stack([values.mean(axis=1) for values in outcomes], axis=-1)
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(np.stack(drawn, axis=-1)), [tail, 1 - tail], axis=0)
    value = statistic(observed[np.newaxis])[0]
    return Interval(*(np.asarray(bound) for bound in (value, low, high)))


def mean_over_datasets(metrics: np.ndarray) -> np.ndarray:
    """Each point's metric, averaged over the datasets: [draws, points]."""
    return metrics.mean(axis=-1)


def area_under_curve(num_reduced: Sequence[int]) -> Statistic:
    """The area under the curve of `mean_over_datasets`, by trapezoids, as a share of the range it covers.

    `num_reduced` holds the number of reduced layers of each point, ascending. Metrics of at most 1 have an
    area of at most 1; a flat curve's area is its height.
    """
    layers = np.asarray(num_reduced, np.float64)
    if len(layers) < 2 or (np.diff(layers) <= 0).any():
        raise ValueError(f"a curve needs two or more points, ascending, not {list(num_reduced)}")

    def area(metrics: np.ndarray) -> np.ndarray:
        return np.trapezoid(mean_over_datasets(metrics), layers, axis=-1) / (layers[-1] - layers[0])

    return area
