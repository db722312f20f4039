"""Which work runs when, and from which stored states. No arrays: the dry run counts with the same functions.

A batch has one block of rows per work group. While all groups have a block, all evaluate their own block under the same plan,
plan by plan: control flow is the same everywhere, and each plan is finished as early as possible. For a batch with fewer
blocks than groups, pairs (plan, block) of about the same length run side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlens_jax.plan import Plan


@dataclass(frozen=True)
class Item:
    """One block of a batch under one plan, both by number."""

    plan: int
    block: int


@dataclass(frozen=True)
class Step:
    """The work of all groups at one time: one item per group, None for an idle group."""

    batch: int
    items: tuple[Item | None, ...]


def schedule(filled: Sequence[Sequence[bool]], costs: Sequence[int]) -> list[Step]:
    """The steps that evaluate every plan on every filled block of every batch once.

    Args:
        filled: for each batch, which groups' blocks have rows.
        costs: the number of layers to run for each plan.
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
            # The longest item goes to the group with the least load so far.
            by_load = sorted(range(groups), key=lambda group: load[group])
            for item, group in zip(pairs[first : first + groups], by_load, strict=False):
                items[group] = item
                load[group] += costs[item.plan]
            steps.append(Step(batch, tuple(items)))
    return steps


def filled_blocks(rows: int, batch_size: int, groups: int) -> list[list[bool]]:
    """The batches of `rows` rows in one bucket: for each batch, which groups' blocks have rows."""
    blocks = -(-rows // batch_size)
    return [[start + group < blocks for group in range(groups)] for start in range(0, blocks, groups)]


def first_layer(base: Plan, plan: Plan, num_layers: int) -> int:
    """The first layer to run for `plan` from the states of `base`: where they differ, else the last layer."""
    difference = base.lowest_difference(plan)
    return num_layers - 1 if difference is None else difference


def memory_parts(state_bytes: Sequence[int], budget: float) -> list[range]:
    """Batches, by number, whose base states are kept at the same time: all of them, or as many as fit into `budget`."""
    if sum(state_bytes) <= budget:
        return [range(len(state_bytes))]
    size = max(1, int(budget // max(state_bytes)))
    return [range(start, min(start + size, len(state_bytes))) for start in range(0, len(state_bytes), size)]


@dataclass(frozen=True)
class Upkeep:
    """The work that makes some states available."""

    kept: int
    """Stored states that stay valid; 0 means that the prompts must be embedded."""
    layers: range
    """The layers to run after that, each from the states that enter it."""


class StoredStates:
    """Which base states of a batch are stored: those that enter layers 0 .. `held` - 1 under `plan`."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.held = 0

    def require(self, plan: Plan, layer: int) -> Upkeep:
        """Record that the states entering `layer` under `plan` are stored from now on; returns what makes them."""
        difference = self.plan.lowest_difference(plan)
        kept = self.held if difference is None else min(self.held, difference + 1)
        self.plan, self.held = plan, max(kept, layer + 1)
        return Upkeep(kept, range(max(kept, 1) - 1, layer))
