"""Every plan meets every block once, groups are evenly loaded, and plans differ side by side only where blocks lack."""

from collections import Counter

import numpy as np
import pytest

from rlens_jax.engine.schedule import Step, StoredStates, filled_blocks, first_layer, memory_parts, schedule
from rlens_jax.plan import Plan


def filled(blocks: int, groups: int) -> list[list[bool]]:
    """A bucket's batches: `blocks` full blocks, laid out batch after batch."""
    return filled_blocks(4 * blocks, 4, groups)


def loads(steps: list[Step], costs: list[int]) -> np.ndarray:
    """Layer-steps of each group."""
    return np.array([[0 if item is None else costs[item.plan] for item in step.items] for step in steps]).sum(axis=0)


def test_blocks() -> None:
    assert filled_blocks(25, 4, 3) == [[True] * 3, [True] * 3, [True, False, False]]
    assert filled_blocks(12, 4, 3) == [[True] * 3]
    assert filled_blocks(0, 4, 3) == []


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 5, 8, 11, 17])
def test_everything_once(groups: int, blocks: int) -> None:
    costs = [5, 3, 1, 4]
    layout = filled(blocks, groups)
    done = Counter(
        (step.batch, item.block, item.plan) for step in schedule(layout, costs) for item in step.items if item is not None
    )
    expected = {
        (batch, group, plan)
        for batch, row in enumerate(layout)
        for group in range(groups)
        if row[group]
        for plan in range(len(costs))
    }
    assert set(done) == expected
    assert set(done.values()) == {1}


def test_full_batches_run_one_plan_at_a_time() -> None:
    steps = schedule(filled(16, 8), [3, 2, 1])
    assert [(step.batch, {item.plan for item in step.items if item}) for step in steps] == [
        (0, {0}),
        (1, {0}),
        (0, {1}),
        (1, {1}),
        (0, {2}),
        (1, {2}),
    ]
    assert all(item is not None and item.block == group for step in steps for group, item in enumerate(step.items))


def test_few_batches_are_shared_by_all_groups() -> None:
    steps = schedule(filled(5, 8), [1] * 7)
    assert len(steps) == 5  # 35 items on 8 groups: nothing less is possible
    assert loads(steps, [1] * 7).max() == 5


@pytest.mark.parametrize("buckets", [1, 5, 12])
def test_a_round_on_64_groups(buckets: int) -> None:
    """2350 samples in batches of 8, 21 candidates that start at layers 0 .. 20 of 28."""
    costs = [28 - layer for layer in range(21)]
    rng = np.random.default_rng(0)
    samples = rng.multinomial(2350, rng.dirichlet(np.full(buckets, 2.0)))
    layout = [row for count in samples for row in filled(-(-int(count) // 8), 64)]
    load = loads(schedule(layout, costs), costs)
    assert load.max() / load.mean() <= 1.15


def test_long_and_short_items_do_not_wait_for_each_other() -> None:
    costs = [28 - layer for layer in range(21)]
    steps = schedule(filled(20, 64), costs)
    used = sum(costs[item.plan] for step in steps for item in step.items if item)
    waited = 64 * sum(max(costs[item.plan] for item in step.items if item) for step in steps)
    assert waited / used <= 1.25


def test_stored_states_are_those_of_the_plan_and_no_layer_runs_in_vain() -> None:
    """A state is known by what was done below its layer."""

    def below(plan: Plan, layer: int) -> list[tuple[bool, bool]]:
        return list(zip(*(flags[:layer].tolist() for flags in plan.flags(6)), strict=True))

    rng = np.random.default_rng(0)
    plans = [Plan(tuple(np.flatnonzero(rng.random(6) < 0.5)), tuple(np.flatnonzero(rng.random(6) < 0.5))) for _ in "abcd"]
    stored, states = StoredStates(), []
    for _ in range(200):
        plan, layer = plans[rng.integers(4)], int(rng.integers(6))
        valid = next((i for i, state in enumerate(states) if state != below(plan, i)), len(states))
        upkeep = stored.require(plan, layer)
        assert upkeep.kept == valid
        states = states[: upkeep.kept] or [[]]
        for first in upkeep.layers:
            assert first == len(states) - 1
            states.append([*states[first], below(plan, 6)[first]])
        assert len(states) == stored.held > layer
        assert states[layer] == below(plan, layer)


def test_the_first_layer_to_run() -> None:
    assert first_layer(Plan((4,)), Plan((4,), (2,)), 6) == 2
    assert first_layer(Plan((4,)), Plan((4,)), 6) == 5


def test_parts_fit_into_the_budget() -> None:
    assert memory_parts([3, 4, 5], 12) == [range(3)]
    assert memory_parts([3, 4, 5, 1], 11) == [range(2), range(2, 4)]
    assert memory_parts([3, 4], 0) == [range(1), range(1, 2)]
