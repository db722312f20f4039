"""HallusionBench by hand: right answers, figures all right, questions right on all figures."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from tests.metrics.benchmarks import Hits, hallusion_rows


def accuracies(rows: list[Row], prefix: str = "") -> list[float]:
    breakdown = score("HallusionBench", rows).breakdown
    return [breakdown[prefix + name] for name in ("aAcc", "fAcc", "qAcc")]


def one_set(*figures: tuple[int, ...]) -> Hits:
    """Hits of set 0 by figure, each over the same questions."""
    return {("0", str(figure), str(question)): hit for figure, hits in enumerate(figures) for question, hit in enumerate(hits)}


@pytest.mark.parametrize(
    ("hits", "expected"),
    [
        (one_set((1,)), [100, 100, 100]),
        (one_set((0,)), [0, 0, 0]),
        (one_set((1, 1), (1, 1)), [100, 100, 100]),
        (one_set((0, 0), (0, 0)), [0, 0, 0]),
        (one_set((1, 0)), [50, 0, 50]),  # a figure, two questions
        (one_set((1,), (0,)), [50, 50, 0]),  # two figures, a question
        (one_set((1, 0), (1, 1)), [75, 50, 50]),
        (one_set((1, 1), (0, 0)), [50, 50, 0]),
        (one_set((1, 0), (1, 0)), [50, 0, 50]),
        (one_set((1, 0), (0, 1)), [50, 0, 0]),
        (one_set((1, 1, 1), (1, 1, 0)), [500 / 6, 50, 200 / 3]),
        (one_set((1, 1, 1), (0, 1, 1), (1, 1, 1)), [800 / 9, 200 / 3, 200 / 3]),
        # Not all questions of all figures.
        ({("0", "0", "0"): 1, ("0", "0", "1"): 0, ("0", "1", "1"): 1}, [200 / 3, 50, 50]),
        # The same figure and question in another set is another figure and question.
        ({("0", "0", "0"): 1, ("1", "0", "0"): 0}, [50, 50, 50]),
        ({("0", "0", "0"): 1, ("0", "1", "0"): 1, ("1", "0", "0"): 0}, [200 / 3, 200 / 3, 50]),
        # Figure 1 of set 0 and figure 0 of set 1 are two, as are set 1, figure 12 and set 11, figure 2.
        ({("0", "1", "0"): 1, ("1", "0", "0"): 0}, [50, 50, 50]),
        ({("1", "12", "0"): 1, ("11", "2", "0"): 0}, [50, 50, 50]),
    ],
)
def test_the_three_accuracies(hits: Hits, expected: list[float]):
    rows = hallusion_rows(hits)
    assert accuracies(rows) == pytest.approx(expected)
    result = score("HallusionBench", rows)
    assert result.value == pytest.approx(sum(expected) / 3)
    assert result.unit == "%"
    assert result.per_sample == tuple(hits.values())


def test_sets_of_two_l2_categories_are_two():
    rows = [*hallusion_rows(one_set((1, 1)), l2_category="chart"), *hallusion_rows(one_set((0, 1)), l2_category="map")]
    assert accuracies(rows) == [75, 50, 75]


def test_sets_of_the_same_l2_category_in_two_categories_are_one():
    # Both VD and VS have "ocr", and VLMEvalKit's keys do not tell them apart over all rows.
    rows = [
        *hallusion_rows({("0", "0", "0"): 1}, category="VD", l2_category="ocr"),
        *hallusion_rows({("0", "0", "0"): 0}, category="VS", l2_category="ocr"),
    ]
    assert accuracies(rows) == [50, 0, 0]
    assert accuracies(rows, "category/VD/") == [100, 100, 100]
    assert accuracies(rows, "category/VS/") == [0, 0, 0]


def test_breakdown():
    rows = [
        *hallusion_rows(one_set((1, 0), (1, 1)), category="VD", l2_category="math"),
        *hallusion_rows(one_set((0,)), category="VS", l2_category="map"),
        *hallusion_rows(one_set((1,), (0,)), category="VS", l2_category="chart"),
    ]
    assert accuracies(rows, "l2_category/math/") == [75, 50, 50]
    assert accuracies(rows, "l2_category/map/") == [0, 0, 0]
    assert accuracies(rows, "l2_category/chart/") == [50, 50, 0]
    assert accuracies(rows, "category/VD/") == [75, 50, 50]
    assert accuracies(rows, "category/VS/") == pytest.approx([100 / 3, 100 / 3, 0])
    assert accuracies(rows) == pytest.approx([400 / 7, 40, 25])


def test_the_index_may_have_further_parts():
    rows = [Row("a_b_c_0_1_2_x", "yes", ("Yes",), l2_category="map")]
    assert score("HallusionBench", rows).value == 100


def test_a_set_is_drawn_as_a_whole():
    rows = [
        *hallusion_rows(one_set((1, 0), (1, 1)), l2_category="math"),
        *hallusion_rows({("1", "0", "0"): 1}, l2_category="math"),
        *hallusion_rows(one_set((1,)), l2_category="map"),
    ]
    groups = score("HallusionBench", rows).groups
    assert groups[0] == groups[1] == groups[2] == groups[3]
    assert len(set(groups)) == 3


@pytest.mark.parametrize(
    ("index", "l2_category", "message"),
    [
        ("17", "map", "row 17: the index must have six parts"),
        ("a_b_c_0_1", "map", "row a_b_c_0_1: the index must have six parts"),
        ("a_b_c_0_1_2", None, "row a_b_c_0_1_2: no l2-category"),
    ],
)
def test_bad_rows(index: str, l2_category: str | None, message: str):
    with pytest.raises(UserError, match=f"HallusionBench: {message}"):
        score("HallusionBench", [Row(index, "yes", ("Yes",), l2_category=l2_category)])
