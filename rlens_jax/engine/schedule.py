"""Where a plan starts, and which base states are in memory together. No arrays."""

from collections.abc import Sequence

from rlens_jax.plans import Plan


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
