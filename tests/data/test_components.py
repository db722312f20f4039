"""Connected items, against a search through the graph."""

import numpy as np

from rlens_jax.data.components import components


def test_items_are_connected_by_common_labels() -> None:
    assert components([]) == []
    assert components([["a"], ["b"], ["c"], ["b", "a"], [], ["d"], ["c", "d"]]) == [0, 0, 1, 0, 2, 1, 1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = [set(rng.integers(0, 12, rng.integers(1, 3)).tolist()) for _ in range(12)]
        numbers = components(labels)
        for item in range(12):
            reached, before = labels[item], set()
            while reached != before:
                before, reached = reached, set().union(*(other for other in labels if other & reached))
            assert {i for i in range(12) if labels[i] & reached} == {i for i in range(12) if numbers[i] == numbers[item]}
