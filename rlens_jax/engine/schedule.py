"""Which work group evaluates which block of a batch under which plan, and when.

A batch has one block of rows a work group. While all groups have a block, all evaluate their own under the same plan, plan by
plan: control flow is the same everywhere, and a plan is finished as early as can be. Of a batch with fewer blocks than groups,
(plan, block) pairs are put side by side, those of about the same length together.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One block of a batch under one plan (both by number)."""

    plan: int
    block: int


@dataclass(frozen=True)
class Step:
    """What all groups do at the same time: an item a group, None for a group that has nothing to do."""

    batch: int
    items: tuple[Item | None, ...]


def schedule(filled: Sequence[Sequence[bool]], costs: Sequence[int]) -> list[Step]:
    """The steps that evaluate every plan on every filled block of every batch once.

    Args:
        filled: for each batch, which groups' blocks have rows.
        costs: of each plan, in layers that are computed anew.
    """
    groups = len(filled[0])
    load = [0] * groups
    uniform: list[tuple[int, list[int]]] = []
    partial: list[tuple[int, list[int]]] = []
    for batch, has_rows in enumerate(filled):
        blocks = [group for group in range(groups) if has_rows[group]]
        side_by_side = -(-len(blocks) * len(costs) // groups)
        (partial if side_by_side < len(costs) else uniform).append((batch, blocks))
    steps = []
    for plan, cost in enumerate(costs):
        for batch, blocks in uniform:
            steps.append(Step(batch, tuple(Item(plan, g) if g in blocks else None for g in range(groups))))
            for group in blocks:
                load[group] += cost
    for batch, blocks in partial:
        pairs = [Item(plan, block) for plan in range(len(costs)) for block in blocks]
        pairs.sort(key=lambda item: -costs[item.plan])
        for first in range(0, len(pairs), groups):
            items: list[Item | None] = [None] * groups
            # The longest pair goes to the group that has had the least to do.
            by_load = sorted(range(groups), key=lambda group: load[group])
            for item, group in zip(pairs[first : first + groups], by_load, strict=False):
                items[group] = item
                load[group] += costs[item.plan]
            steps.append(Step(batch, tuple(items)))
    return steps
