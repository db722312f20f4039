"""Rows in buckets, work groups and blocks."""

import numpy as np
import pytest

from rlens_jax.engine.dealing import deal, fill_buckets, rows_per_block, share_trunk
from rlens_jax.engine.shapes import row_slots


def random_rows(count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    draw = np.random.default_rng(0)
    rows = np.stack([draw.integers(8, 64, count), draw.integers(1, 512, count)], axis=1).tolist()
    return [(text, visual) for text, visual in rows], [(64, 128), (64, 256), (64, 384), (64, 512)]


@pytest.mark.parametrize("groups", [1, 4, 7])
def test_every_row_is_in_a_bucket_that_holds_it_and_only_the_last_is_not_full(groups: int) -> None:
    rows, buckets = random_rows(200)
    chosen = fill_buckets(rows, buckets, row_slots, groups)
    assert all(text <= buckets[b][0] and visual <= buckets[b][1] for (text, visual), b in zip(rows, chosen, strict=True))
    assert [chosen.count(bucket) % groups for bucket in range(1, 4)] == [0, 0, 0]


def test_one_group_has_the_cheapest_buckets() -> None:
    rows, buckets = random_rows(50)
    assert fill_buckets(rows, buckets, row_slots, 1) == [(visual - 1) // 128 for _, visual in rows]


def test_a_place_is_given_to_the_most_expensive_row_that_fits() -> None:
    # One long row leaves a place; the row with too much text cannot have it.
    assert fill_buckets([(8, 400), (8, 100), (8, 120), (60, 128)], [(64, 128), (16, 512)], row_slots, 2) == [1, 0, 1, 0]


def test_groups_have_equal_numbers_of_rows_and_equal_costs() -> None:
    draw = np.random.default_rng(1)
    costs, buckets = draw.uniform(1, 100, 130).tolist(), draw.integers(0, 3, 130).tolist()
    dealt = deal(costs, buckets, 4)
    assert sorted(row for rows in dealt for row in rows) == list(range(130))
    for bucket in range(3):
        most = -(-buckets.count(bucket) // 4)
        assert all(sum(buckets[row] == bucket for row in rows) <= most for rows in dealt)
    loads = [sum(costs[row] for row in rows) for rows in dealt]
    assert max(loads) < 1.02 * min(loads)


def test_dealing_is_the_same_each_time_and_needs_no_row_for_each_group() -> None:
    assert deal([3, 3, 3], [0, 0, 0], 5) == deal([3, 3, 3], [0, 0, 0], 5) == [[0], [1], [2], [], []]
    assert deal([], [], 2) == [[], []]
    # No group has more rows than places, however little they cost.
    assert deal([100, 1, 1, 1], [0, 0, 0, 0], 2) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("slots", "rows", "budget", "expected"),
    [(1000, 5, 4000, 3), (1000, 4, 4000, 4), (5000, 3, 4000, 1), (1000, 1, 4000, 1), (100, 41, 4000, 21)],
)
def test_blocks_are_filled_evenly(slots: int, rows: int, budget: int, expected: int) -> None:
    assert rows_per_block(slots, rows, budget) == expected


def test_a_row_takes_samples_until_its_branches_are_longer_than_its_trunk() -> None:
    assert share_trunk(10, [4, 4, 4, 4, 4]) == [range(3), range(3, 5)]
    assert share_trunk(100, [4, 4, 4]) == [range(3)]
    assert share_trunk(100, [4, 4, 4], most=9) == [range(2), range(2, 3)]
    # All answers of a sample are in one row.
    assert share_trunk(10, [50, 4], most=20) == [range(1), range(1, 2)]
    assert share_trunk(10, []) == []
