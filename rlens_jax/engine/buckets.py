"""Few static shapes with little padding, chosen from the sizes that the data have.

A size is a tuple of counts: text and visual tokens of a row; patches, or views and patches, of an image. A bucket is a size too,
and holds every size that is not larger in any count. All functions are deterministic: the processes of a run, and a run that is
resumed, choose the same buckets from the same sizes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, ...]
Cost = Callable[[np.ndarray], np.ndarray]
"""Slots of sizes [n, counts], as [n]: the sum of a row's counts, the product of an image's."""

MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
"""Counts of buckets are rounded up to one of these: 128 fills a TPU's tiles."""
SLACK, ENOUGH = 0.02, 0.1
"""A coarser multiple, or fewer buckets, may add `SLACK` to the share of padding while it stays below `ENOUGH` (our decision)."""
MOST_SIZES = 512
"""Different sizes that the search for buckets takes at most; more are rounded first. It needs the square of this in memory."""


@dataclass(frozen=True)
class Chosen:
    """Buckets, the smallest first, and the share of their slots that is padding."""

    buckets: tuple[Size, ...]
    padding: float


def smallest(buckets: Iterable[Size], size: Size, cost: Cost) -> Size | None:
    """The bucket with the fewest slots that holds a size, None if none does."""
    holding = [bucket for bucket in buckets if all(count <= slots for count, slots in zip(size, bucket, strict=True))]
    return min(holding, key=lambda bucket: (int(cost(np.array([bucket]))[0]), bucket), default=None)


def padding(sizes: Mapping[Size, int], buckets: Iterable[Size], cost: Cost) -> float:
    """The share of slots that hold padding if every size is in its smallest bucket; every size fits one."""
    filled = _placed(sizes, tuple(buckets), cost)
    slots = sum(int(cost(np.array([bucket]))[0]) * sum(sizes[size] for size in members) for bucket, members in filled.items())
    return 1 - sum(int(cost(np.array([size]))[0]) * count for size, count in sizes.items()) / max(1, slots)


def choose_buckets(sizes: Mapping[Size, int], limit: int, cost: Cost, may_round: Sequence[bool]) -> Chosen:
    """At most `limit` buckets that hold all sizes with little padding.

    Tries every multiple of `MULTIPLES`, and takes the coarsest one that pads about as little as the best (`SLACK`), and then the
    smallest number of buckets that does.

    Args:
        sizes: how often each size occurs.
        limit: most buckets.
        cost: slots of a size.
        may_round: for each count, whether it may be rounded up.
    """
    options = [chosen for multiple in _multiples(sizes) for chosen in _options(sizes, multiple, limit, cost, may_round)]
    best = min(chosen.padding for chosen in options)
    allowed = max(best, min(best + SLACK, ENOUGH))
    return next(chosen for chosen in options if chosen.padding <= allowed)


def _multiples(sizes: Mapping[Size, int]) -> Sequence[int]:
    largest = max(map(max, sizes))
    return [multiple for multiple in MULTIPLES if multiple <= max(1, largest)]


def _options(sizes: Mapping[Size, int], multiple: int, limit: int, cost: Cost, may_round: Sequence[bool]) -> list[Chosen]:
    """The best choices of 1, 2, ... `limit` buckets whose counts are multiples; none if there are too many sizes for them."""
    rounded = _rounded(sizes, multiple, may_round)
    if len(rounded) > MOST_SIZES and multiple < MULTIPLES[0]:
        return []
    while len(rounded) > MOST_SIZES:
        multiple *= 2
        rounded = _rounded(sizes, multiple, may_round)
    points = np.array(sorted(rounded))
    orders = [np.lexsort(points.T[::-1]), np.lexsort(points.T)]
    found: dict[int, Chosen] = {}
    for order in orders if points.shape[1] > 1 else orders[:1]:
        counts = np.array([rounded[tuple(size)] for size in points[order].tolist()])
        for buckets in _partitions(points[order], counts, limit, cost):
            tight = _tightened(rounded, buckets, cost)
            chosen = Chosen(tight, padding(sizes, tight, cost))
            if len(tight) not in found or chosen.padding < found[len(tight)].padding:
                found[len(tight)] = chosen
    return [found[number] for number in sorted(found)]


def _rounded(sizes: Mapping[Size, int], multiple: int, may_round: Sequence[bool]) -> Counter[Size]:
    """The sizes with counts rounded up, except for those that are the same everywhere.

    A multiple of what all counts are multiples of stays one: a vision tower may merge groups of patches.
    """
    columns = list(zip(*sizes, strict=True))
    steps = [
        math.lcm(multiple, math.gcd(*column)) if allowed and len(set(column)) > 1 else 1
        for column, allowed in zip(columns, may_round, strict=True)
    ]
    rounded: Counter[Size] = Counter()
    for size, count in sizes.items():
        rounded[tuple(-(-value // step) * step for value, step in zip(size, steps, strict=True))] += count
    return rounded


def _partitions(points: np.ndarray, counts: np.ndarray, limit: int, cost: Cost) -> list[tuple[Size, ...]]:
    """For 1, 2, ... `limit`: the cheapest cut of sorted sizes [n, counts] into so many runs, each with its smallest bucket."""
    total, before = len(points), np.concatenate([[0], np.cumsum(counts)])
    runs = np.full((total, total), np.inf)  # slots of the run from a first to a last size
    for first in range(total):
        corners = np.maximum.accumulate(points[first:], axis=0)
        runs[first, first:] = cost(corners) * (before[first + 1 :] - before[first])
    best = np.concatenate([[0.0], np.full(total, np.inf)])  # slots of the sizes before a place
    cuts: list[np.ndarray] = []
    found = []
    for _ in range(min(limit, total)):
        costs = best[:total, None] + runs
        cuts.append(costs.argmin(axis=0))
        best = np.concatenate([[np.inf], costs.min(axis=0)])
        last, buckets = total - 1, []
        for chosen in reversed(cuts):
            first = int(chosen[last])
            buckets.append(tuple(points[first : last + 1].max(axis=0).tolist()))
            last = first - 1
        found.append(tuple(buckets))
    return found


def _tightened(sizes: Mapping[Size, int], buckets: tuple[Size, ...], cost: Cost) -> tuple[Size, ...]:
    """The buckets that are needed, the smallest first, each as small as the sizes allow for which it is the smallest."""
    while True:
        filled = _placed(sizes, buckets, cost)
        tight = tuple(sorted({tuple(map(max, *members)) if len(members) > 1 else members[0] for members in filled.values()}))
        if set(tight) == set(buckets):
            return tuple(sorted(tight, key=lambda bucket: (int(cost(np.array([bucket]))[0]), bucket)))
        buckets = tight


def _placed(sizes: Iterable[Size], buckets: tuple[Size, ...], cost: Cost) -> dict[Size, list[Size]]:
    filled: dict[Size, list[Size]] = {}
    for size in sizes:
        bucket = smallest(buckets, size, cost)
        assert bucket is not None
        filled.setdefault(bucket, []).append(size)
    return filled
