"""Where a plan starts, and which base states are in memory together."""

from rlens_jax.engine.schedule import first_layer, memory_parts
from rlens_jax.plans import Plan


def test_the_first_layer_to_run() -> None:
    assert first_layer(Plan((4,)), Plan((4,), (2,)), 6) == 2
    assert first_layer(Plan((4,)), Plan((4,)), 6) == 5


def test_parts_fit_into_the_budget() -> None:
    assert memory_parts([3, 4, 5], 12) == [range(3)]
    assert memory_parts([3, 4, 5, 1], 11) == [range(2), range(2, 4)]
    assert memory_parts([3, 4], 0) == [range(1), range(1, 2)]
