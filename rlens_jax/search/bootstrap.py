"""Percentile bootstrap: the interval in which a measured number would lie for other samples of the same kind.

A draw resamples with replacement. It takes as many samples as there are, stratum by stratum: from each dataset of a
curve, and from each stratum of a benchmark (a category of MME). A pair or group counts as one sample, and so do all questions
about the same images. All numbers that are compared are taken from the same draws, so that errors that they share cancel.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rlens_jax.metrics.score import Score

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps metrics float64[draws, points, datasets] to float64[draws] or float64[draws, points]."""


Images = Sequence[Hashable] | None
_Group = tuple[int, str]
"""The place of a dataset, and one of its groups."""


@dataclass(frozen=True)
class Interval:
    """A statistic of the measured data, and the bounds of its interval: float64[points] or float64[] each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def fields(self) -> dict[str, float]:
        """The numbers of a float64[] interval as JSON values."""
        return {"value": float(self.value), "low": float(self.low), "high": float(self.high)}


def bootstrap_interval(
    outcomes_by_dataset: Mapping[str, np.ndarray],
    statistic: Statistic,
    *,
    images: Mapping[str, np.ndarray] | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The interval of a statistic of a curve.

    Args:
        outcomes_by_dataset: per dataset, outcomes [points, samples of the dataset]. Their order decides the draws.
        statistic: `mean_over_datasets`, `area_under_curve(...)`, or another of that form.
        images: per dataset, the number of each sample's images; samples with equal numbers, also of different datasets, are
            drawn together. By default each sample is drawn by itself.
        samples: number of draws.
        seed: seed of the draws.
        level: coverage of the interval.
    """
    outcomes = [np.asarray(values, np.float64) for values in outcomes_by_dataset.values()]
    if images is None:
        ends = np.cumsum([values.shape[1] for values in outcomes])
        groups = np.split(np.arange(ends[-1]), ends[:-1])
    else:
        groups = [images[name] for name in outcomes_by_dataset]
    counts = _draw_images(groups, samples, seed)
    drawn = [times @ values.T / times.sum(axis=1, keepdims=True) for times, values in zip(counts, outcomes, strict=True)]
    measured = np.stack([values.mean(axis=1) for values in outcomes], axis=-1)
    return percentiles(statistic(measured[np.newaxis])[0], statistic(np.stack(drawn, axis=-1)), level)


def mean_over_datasets(metrics: np.ndarray) -> np.ndarray:
    """The metric of each point, averaged over the datasets: [draws, points]."""
    return metrics.mean(axis=-1)


def area_under_curve(num_reduced: Sequence[int]) -> Statistic:
    """The area under the curve of `mean_over_datasets`, by trapezoids, divided by the range of its points.

    `num_reduced` is the number of reduced layers at each point, ascending. Metrics of at most 1 have an area of at most
    1. The area of a flat curve is its height.
    """
    layers = np.asarray(num_reduced, np.float64)
    if len(layers) < 2 or (np.diff(layers) <= 0).any():
        raise ValueError(f"a curve needs two or more points, ascending, not {list(num_reduced)}")

    def area(metrics: np.ndarray) -> np.ndarray:
        return np.trapezoid(mean_over_datasets(metrics), layers, axis=-1) / (layers[-1] - layers[0])

    return area


def score_interval(score: Score, images: Images = None, *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """The interval of a benchmark's score, in the unit of the score. Arguments as in `score_draws` and `bootstrap_interval`."""
    return percentiles(score.value, score_draws(score, images, samples=samples, seed=seed), level)


def difference_interval(score: Score, other: Score, images: Images = None, *, samples: int = 1000, seed: int = 0) -> Interval:
    """The 95 % interval of `score` minus `other`, two scores of the same questions."""
    drawn, others = (score_draws(each, images, samples=samples, seed=seed) for each in (score, other))
    return percentiles(score.value - other.value, drawn - others)


def score_draws(score: Score, images: Images = None, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """The score of the questions of each draw: float64[samples]. `images` as of `Draws`."""
    return Draws([score], [images], samples=samples, seed=seed).scores(0, score)


class Draws:
    """Draws of the questions of several datasets. They depend on the groups, strata and images, not on the answers.

    Args:
        scores: a score of each dataset, for the groups and strata of its questions.
        images: per dataset, of each question, equal for the same images, which are drawn together with all groups that have
            them. They may be in several strata and datasets. None: every group has its own.
        samples, seed: as in `bootstrap_interval`.
    """

    def __init__(self, scores: Sequence[Score], images: Sequence[Images], *, samples: int, seed: int):
        groups_of: dict[tuple[int, str], dict[_Group, None]] = {}  # dataset and stratum -> its groups, in order
        groups: list[_Group] = []
        keys: list[Hashable] = []
        for place, (score, own) in enumerate(zip(scores, images, strict=True)):
            named = [(place, group) for group in score.groups]
            for group, stratum in zip(named, score.strata, strict=True):
                groups_of.setdefault((place, stratum), {})[group] = None
            groups += named
            keys += named if own is None else own
        together = _drawn_together(groups, keys)
        units = [np.array([together[group] for group in named]) for named in groups_of.values()]
        self._counts = np.concatenate(_draw_images(units, samples, seed), axis=1)
        self._column = {group: column for column, group in enumerate(chain.from_iterable(groups_of.values()))}

    def scores(self, place: int, score: Score) -> np.ndarray:
        """The score of a dataset, by its place, in each draw, by the benchmark's own formula: float64[samples].

        The formula matters: MME's acc+ and HallusionBench's fAcc are not means over questions.
        """

        def total(sums: Mapping[str, float]) -> np.ndarray:
            """The sum over the groups of a draw: float64[samples]."""
            return self._counts[:, [self._column[place, group] for group in sums]] @ np.fromiter(sums.values(), np.float64)

        drawn = []
        for ratio in score.ratios:
            numerators, denominators = total(ratio.numerators), total(ratio.denominators)
            # As `Ratio.value`: a draw without anything to count (POPE's F1) has 0.
            drawn.append(
                ratio.scale * np.divide(numerators, denominators, out=np.zeros(len(numerators)), where=denominators != 0)
            )
        return np.sum(drawn, axis=0)


def _draw_images(images: Sequence[np.ndarray], samples: int, seed: int) -> list[np.ndarray]:
    """How often each draw takes each sample of each dataset: float64[draws, size].

    Questions about one image are not independent, so an image is drawn with all its questions. The strata are the images that
    have questions in the same datasets, so that each draw has as many images of each dataset as there are.
    """
    datasets: dict[int, list[int]] = {}
    for dataset, numbers in enumerate(images):
        for image in dict.fromkeys(numbers.tolist()):
            datasets.setdefault(image, []).append(dataset)
    strata: dict[tuple[int, ...], list[int]] = {}
    for image, members in datasets.items():
        strata.setdefault(tuple(members), []).append(image)
    counts = np.concatenate(_draw_counts(map(len, strata.values()), samples, seed), axis=1)
    column = {image: place for place, image in enumerate(chain.from_iterable(strata.values()))}
    return [counts[:, [column[image] for image in numbers.tolist()]] for numbers in images]


def _drawn_together(groups: Sequence[_Group], images: Sequence[Hashable]) -> dict[_Group, int]:
    """For each group, a number that is equal for all groups that have an image in common, directly or through others."""
    parent: dict[Hashable, Hashable] = {}

    def name(item: Hashable) -> Hashable:
        while (above := parent.setdefault(item, item)) != item:
            parent[item] = parent[above]
            item = above
        return item

    for group, image in zip(groups, images, strict=True):
        parent[name((1, image))] = name((0, group))
    numbers: dict[Hashable, int] = {}
    return {group: numbers.setdefault(name((0, group)), len(numbers)) for group in groups}


def _draw_counts(sizes: Iterable[int], samples: int, seed: int) -> list[np.ndarray]:
    """How often each draw takes each sample, which decides every mean and ratio: float64[draws, size] per stratum."""
    draw = np.random.default_rng(seed)
    return [draw.multinomial(size, np.full(size, 1 / size), size=samples).astype(np.float64) for size in sizes]


def percentiles(value: np.ndarray | float, drawn: np.ndarray, level: float = 0.95) -> Interval:
    """The percentile interval of a number, of coverage `level`, from its drawn values [draws, ...]."""
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return Interval(np.asarray(value), np.asarray(low), np.asarray(high))
