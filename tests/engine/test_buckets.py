"""Buckets from sizes: few, deterministic, and with little padding."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from rlens_jax.engine.buckets import Size, choose_buckets, padding, smallest
from rlens_jax.engine.shapes import image_slots, row_slots

BOTH = (True, True)
rng = np.random.default_rng(0)
DATA = {
    "30 small images": [(int(t), int(v)) for t, v in zip(rng.integers(20, 40, 30), rng.integers(4, 60, 30), strict=True)],
    "30 large images": [(int(t), int(v)) for t, v in zip(rng.integers(30, 90, 30), rng.integers(64, 2000, 30), strict=True)],
    "tiles": [(int(t), 256 * int(n)) for t, n in zip(rng.integers(30, 90, 500), rng.integers(1, 14, 500), strict=True)],
    "long texts": [(int(t), 64) for t in rng.integers(30, 400, 100)],
    "one size": [(32, 128)] * 9,
    "no images": [(20, 0), (32, 0)],
}


@pytest.mark.parametrize("name", DATA)
def test_few_buckets_hold_all_with_little_padding(name: str) -> None:
    sizes = Counter(DATA[name])
    chosen = choose_buckets(sizes, 8, row_slots, BOTH)
    assert 1 <= len(chosen.buckets) <= 8
    assert all(smallest(chosen.buckets, size, row_slots) for size in sizes)
    assert chosen.padding == padding(sizes, chosen.buckets, row_slots) <= 0.12
    shuffled = random.Random(1).sample(DATA[name], len(DATA[name]))
    assert choose_buckets(Counter(shuffled), 8, row_slots, BOTH) == chosen


def test_nothing_is_compiled_for_nothing() -> None:
    assert choose_buckets(Counter({(32, 128): 9}), 8, row_slots, BOTH).buckets == ((32, 128),)
    near = Counter({(100, 1000): 5, (101, 1001): 5})
    assert len(choose_buckets(near, 8, row_slots, BOTH).buckets) == 1


def test_tiles_of_a_tpu_are_filled_where_that_costs_little() -> None:
    chosen = choose_buckets(Counter(DATA["tiles"]), 8, row_slots, BOTH)
    assert all(count % 64 == 0 for bucket in chosen.buckets for count in bucket)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_other_buckets_pad_less(limit: int) -> None:
    sizes = Counter({(n,): count for n, count in ((3, 5), (4, 1), (9, 2), (10, 7), (17, 1), (23, 3))})
    best = min(
        padding(sizes, chosen, image_slots)
        for count in range(1, limit + 1)
        for chosen in itertools.combinations(sizes, count)
        if (23,) in chosen
    )
    assert choose_buckets(sizes, limit, image_slots, (False,)).padding <= max(best + 1e-9, min(best + 0.02, 0.1))


def test_patches_that_are_merged_in_groups_stay_groups() -> None:
    sizes = Counter[Size]({(9 * n,): 1 for n in range(30, 90)})
    assert all(bucket[0] % 9 == 0 for bucket in choose_buckets(sizes, 4, image_slots, (True,)).buckets)


def test_a_count_that_may_not_be_rounded_stays_one_of_the_given() -> None:
    sizes = Counter[Size]({(views, 1000 + 3 * views): 1 for views in range(1, 11)})
    chosen = choose_buckets(sizes, 4, image_slots, (False, True))
    assert len(chosen.buckets) == 4
    assert {views for views, _ in chosen.buckets} <= set(range(1, 11))


def test_thousands_of_sizes_take_seconds() -> None:
    sizes = Counter((int(t), int(v)) for t, v in zip(rng.integers(40, 400, 3000), rng.integers(64, 16000, 3000), strict=True))
    assert len(choose_buckets(sizes, 8, row_slots, BOTH).buckets) <= 8
