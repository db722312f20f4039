"""Choices of visual tokens where they are degenerate; tests/families/test_token_selection.py compares them with PyTorch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.kept_tokens import Pooling, Selection, StridedTokens
from rlens_jax.layout import TokenLayout
from rlens_jax.ops.token_pruning import num_survivors
from rlens_jax.ops.token_selection import (
    Budget,
    drawn_tokens,
    most_diverse,
    most_relevant_and_diverse,
    pooled_tokens,
    relevance,
    strided_tokens,
)
from tests.numerics import assert_close
from tests.sequences import make_layout, run_length

KEY = jax.random.key(0)


def layout_of(counts: Sequence[int], spare: int = 2, seeds: Sequence[int] | None = None) -> TokenLayout:
    """Samples of a text token, so many visual tokens, and another text token."""
    return make_layout([run_length(1, count, 1) if count else run_length(2) for count in counts], (0, spare), seeds)


def budget_of(layout: TokenLayout, pruning: Selection) -> Budget:
    return Budget(num_survivors(layout, pruning), pruning.capacity(layout.bucket.visual))


def test_strided_tokens_with_room_to_spare() -> None:
    layout = layout_of([7, 2, 0], spare=3)
    assert strided_tokens(layout, budget_of(layout, StridedTokens(3))).tolist() == [[0, 2, 4], [0, 1, 10], [10, 10, 10]]


def test_a_draw_is_that_of_run_and_sample_whatever_its_batch() -> None:
    layout, pruning = layout_of([40, 40, 9], seeds=[5, 6, 7]), StridedTokens(8)
    together = np.asarray(drawn_tokens(layout, budget_of(layout, pruning), KEY))
    other = layout_of([40], spare=30, seeds=[6])
    assert drawn_tokens(other, budget_of(other, pruning), KEY).tolist() == [together[1].tolist()]
    assert drawn_tokens(other, budget_of(other, pruning), jax.random.key(1)).tolist() != [together[1].tolist()]
    assert together[0].tolist() != together[1].tolist()
    assert all(len(set(row)) == 8 and row == sorted(row) for row in together.tolist())
    assert together.max() < 40
    counts = np.zeros(40, int)
    many = layout_of([40] * 200)
    np.add.at(counts, np.asarray(drawn_tokens(many, budget_of(many, pruning), KEY)), 1)
    assert counts.min() > 15  # 40 are expected
    assert counts.max() < 70


def test_equal_tokens_are_chosen_once_and_padding_never() -> None:
    """Ties go to the lower ordinal; the published code may choose a duplicate twice."""
    x = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [9, 9], [9, 9]], np.float32)
    layout = layout_of([5, 1, 0])
    tokens = jnp.asarray(np.stack([x, x, x]))
    ordinals, finite = most_diverse(tokens, layout, Budget(jnp.asarray([4, 1, 0]), 4))
    assert ordinals.tolist() == [[0, 1, 2, 4], [0, 7, 7, 7], [7, 7, 7, 7]]
    assert finite.all()
    assert not most_diverse(tokens.at[0, 2, 1].set(jnp.nan), layout, Budget(jnp.asarray([4, 1, 0]), 4))[1][0]


def test_what_equal_tokens_leave_of_the_budget_is_filled_by_relevance() -> None:
    """Three directions, a budget of five: after three steps nothing is left of the determinant."""
    x = np.eye(3, 8, dtype=np.float32)[[0, 0, 0, 1, 1, 2, 2]]
    layout, relevant = layout_of([7, 2], spare=0), jnp.asarray([[0.1, 0.5, 0.3, 0.9, 0.8, 0.0, 1.0], [1, 1, 0, 0, 0, 0, 0]])
    tokens = jnp.asarray(np.stack([x, x]))
    ordinals, finite = most_relevant_and_diverse(tokens, relevant, layout, Budget(jnp.asarray([5, 1]), 5))
    assert ordinals.tolist() == [[1, 2, 3, 4, 6], [0, 7, 7, 7, 7]]
    assert finite.all()


def test_relevance_is_scaled_within_each_sample() -> None:
    layout = layout_of([3, 2, 1], spare=0)
    tokens = jnp.asarray([[[1.0, 0], [0, 2], [1, 1]], [[3, 0], [3, 0], [9, 9]], [[1, 1], [0, 0], [0, 0]]])
    text = jnp.asarray([[[4.0, 0], [7, 7]]] * 3)
    found = relevance(tokens, layout, text, jnp.asarray([[True, False]] * 3))
    assert_close(found[0], [1 + 1e-6, 1e-6, 0.5**0.5 + 1e-6], 1e-6)
    assert found[1, :2].tolist() == [1, 1]  # equal ones
    assert found[2, 0] == 1


def test_each_image_is_pooled_alone() -> None:
    """A sample of two grids of 3 x 3, and one without any."""
    pooling, layout = Pooling(8, side=3), layout_of([18, 0, 9])
    rng = np.random.default_rng(0)
    visual = rng.standard_normal((3, 20, 5)).astype(np.float32)
    pooled, ordinals = pooled_tokens(jnp.asarray(visual), layout, budget_of(layout, pooling), pooling)
    assert ordinals.tolist() == [[0, 1, 3, 4, 9, 10, 12, 13], [20] * 8, [0, 1, 3, 4, 20, 20, 20, 20]]
    for first in (0, 9):
        grid = visual[0, first : first + 9].reshape(3, 3, 5)
        expected = [grid[i : i + 2, j : j + 2].mean(axis=(0, 1)) for i in (0, 1) for j in (0, 1)]
        assert_close(pooled[0, first // 9 * 4 : first // 9 * 4 + 4], expected, 1e-6)
