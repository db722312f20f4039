"""Where rows go: to which bucket and work group, and how many of them into a block. The dry run counts with the same functions.

All work groups run the same bucket at the same time, so a bucket costs as many rows per group as its fullest group has.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from rlens_jax.engine.buckets import Cost, Size

TOKENS_PER_BLOCK = 4096
"""Slots of a block that keep a device busy (our decision): more are not faster, and leave more places empty."""


def fill_buckets(sizes: Sequence[Size], buckets: Sequence[Size], cost: Cost, groups: int) -> list[int]:
    """The bucket of each row, by number; every row fits one.

    A row goes into the cheapest bucket that holds it. Then places that would stay empty in some work groups are filled with the
    most expensive rows of cheaper buckets: those places cost nothing.
    """
    prices = cost(np.array(buckets))
    order = sorted(range(len(buckets)), key=lambda bucket: (int(prices[bucket]), buckets[bucket]))
    fits: np.ndarray = np.all(np.array(sizes)[:, None] <= np.array(buckets)[None], axis=-1)
    chosen = np.array([next(bucket for bucket in order if holds[bucket]) for holds in fits], int)
    by_cost = np.argsort(-cost(np.array(sizes)), kind="stable")
    for place in range(len(order) - 1, 0, -1):
        bucket, cheaper = order[place], order[:place]
        free = -int((chosen == bucket).sum()) % groups
        movable = fits[by_cost, bucket] & np.isin(chosen[by_cost], cheaper)
        chosen[by_cost[movable][:free]] = bucket
    return chosen.tolist()


def deal(costs: Sequence[float], buckets: Sequence[int], groups: int) -> list[list[int]]:
    """The rows of each work group, by number: of every bucket at most ceil(rows / groups), with about the same cost in all.

    The most expensive row goes to the group with the least cost so far that has a place left.

    Args:
        costs: of each row, such as the pixels of its images: work that its group alone does.
        buckets: the bucket of each row.
        groups: number of work groups.
    """
    dealt: list[list[int]] = [[] for _ in range(groups)]
    loads = [0.0] * groups
    for bucket in sorted(set(buckets), reverse=True):
        members = sorted((row for row, own in enumerate(buckets) if own == bucket), key=lambda row: (-costs[row], row))
        places = [-(-len(members) // groups)] * groups
        waiting = [(load, group) for group, load in enumerate(loads)]
        heapq.heapify(waiting)
        for row in members:
            load, group = heapq.heappop(waiting)
            dealt[group].append(row)
            loads[group] = load + costs[row]
            places[group] -= 1
            if places[group]:
                heapq.heappush(waiting, (loads[group], group))
    return dealt


def rows_per_block(slots: int, rows: int, budget: int = TOKENS_PER_BLOCK) -> int:
    """Rows of a block: at most a budget of slots, in as few blocks as that allows, which are filled evenly.

    Args:
        slots: of the bucket.
        rows: rows of a work group in this bucket, at least one.
        budget: most slots of a block of several rows.
    """
    blocks = -(-rows // max(1, budget // slots))
    return -(-rows // blocks)


def share_trunk(trunk: int, branches: Sequence[int], most: int | None = None) -> list[range]:
    """The samples of each row of one trunk, in order. A row takes samples until its branches have more tokens than the trunk.

    Args:
        trunk: tokens of the trunk.
        branches: tokens of all branches of each sample; a sample has all of them in one row.
        most: tokens of branches that a row can hold.
    """
    rows: list[range] = []
    first, tokens = 0, 0
    for sample, own in enumerate(branches):
        if sample > first and (tokens > trunk or (most is not None and tokens + own > most)):
            rows.append(range(first, sample))
            first, tokens = sample, 0
        tokens += own
    return [*rows, range(first, len(branches))] if branches else []
