"""MME by hand: a category gives the share of right answers plus that of images with both right, in percent."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.choice_metrics import PERCEPTION, REASONING
from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from tests.metrics.benchmarks import Pairs, mme_rows

CATEGORIES = PERCEPTION + REASONING


@pytest.mark.parametrize(
    ("pairs", "accuracy", "both"),
    [
        ([(1, 1)], 100, 100),
        ([(1, 0)], 50, 0),
        ([(0, 1)], 50, 0),
        ([(0, 0)], 0, 0),
        ([(1, 1), (0, 0)], 50, 50),
        ([(1, 0), (0, 1)], 50, 0),
        ([(1, 0), (1, 0)], 50, 0),
        ([(1, 1), (1, 0)], 75, 50),
        ([(1, 1), (1, 1)], 100, 100),
        ([(0, 0), (0, 1)], 25, 0),
        ([(1, 1), (1, 1), (0, 1)], 500 / 6, 200 / 3),
        ([(1, 1), (0, 0), (0, 0)], 100 / 3, 100 / 3),
        ([(1, 1), (1, 0), (0, 0), (1, 1)], 62.5, 50),
        ([(1, 0)] * 5 + [(1, 1)] * 5, 75, 50),
        # VLMEvalKit's acc+ sees the first two questions of an image, its acc all of them.
        ([(1, 1, 0)], 200 / 3, 100),
        ([(0, 1, 1)], 200 / 3, 0),
        ([(1, 1, 1, 1), (1, 0)], 500 / 6, 50),
    ],
)
@pytest.mark.parametrize("category", ["OCR", "text_translation"])
def test_a_category(category: str, pairs: Pairs, accuracy: float, both: float):
    result = score("MME", mme_rows({category: pairs}))
    assert result.breakdown[f"category/{category}/acc"] == pytest.approx(accuracy)
    assert result.breakdown[f"category/{category}/acc+"] == pytest.approx(both)
    assert result.breakdown[f"category/{category}"] == pytest.approx(accuracy + both)
    assert result.value == pytest.approx(13 * 200 + accuracy + both)  # the others are all right


@pytest.mark.parametrize(
    ("others", "value", "perception", "reasoning"),
    [
        ([(1, 1)], 2800, 2000, 800),
        ([(0, 0)], 0, 0, 0),
        ([(1, 0)], 700, 500, 200),  # always yes: half of the answers, no image
        ([(1, 1), (1, 0)], 1750, 1250, 500),
    ],
)
def test_perception_and_reasoning(others: Pairs, value: float, perception: float, reasoning: float):
    result = score("MME", mme_rows({}, others))
    assert result.value == pytest.approx(value)
    assert result.breakdown["perception"] == pytest.approx(perception)
    assert result.breakdown["reasoning"] == pytest.approx(reasoning)
    assert result.unit == "of 2800"


@pytest.mark.parametrize("category", CATEGORIES)
def test_which_categories_are_perception(category: str):
    result = score("MME", mme_rows({category: [(0, 0)]}))
    cognition = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
    lost = "reasoning" if category in cognition else "perception"
    assert result.breakdown["perception"] == 2000 - 200 * (lost == "perception")
    assert result.breakdown["reasoning"] == 800 - 200 * (lost == "reasoning")


def test_a_category_counts_the_same_however_many_images_it_has():
    result = score("MME", mme_rows({"scene": [(0, 0)] * 30}))
    assert result.value == 2600


def test_pairs_are_found_by_image_not_by_neighbourhood():
    # Shuffled, neighbours are of other images: (0, 0) (1, 0) (0, 1) (1, 1) has one image right.
    rows = mme_rows({"count": [(0, 0), (1, 0), (0, 1), (1, 1)]})
    shuffled = sorted(rows, key=lambda row: row.index[::-1])
    assert shuffled != rows
    assert score("MME", shuffled).breakdown == pytest.approx(score("MME", rows).breakdown)
    assert score("MME", shuffled).breakdown["category/count/acc+"] == 25


def test_the_same_image_in_two_categories_is_two_images():
    result = score("MME", mme_rows({"color": [(1, 1)], "count": [(0, 1)]}))
    assert result.breakdown["category/color"] == 200
    assert result.breakdown["category/count"] == 50
    assert len(set(result.groups)) == 14


def test_an_image_is_drawn_as_a_whole_and_within_its_category():
    rows = mme_rows({"OCR": [(1, 1), (1, 0)]})
    result = score("MME", rows)
    assert [result.groups.count(group) for group in result.groups] == [2] * len(rows)
    assert set(result.strata) == set(CATEGORIES)
    assert [stratum for stratum, row in zip(result.strata, rows, strict=True) if row.category == "OCR"] == ["OCR"] * 4


def test_per_sample_scores_are_those_of_the_questions():
    rows = mme_rows({"OCR": [(1, 0), (0, 1)]})
    assert score("MME", rows).per_sample[:4] == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "colour"}, r"row OCR.0.1: unknown category 'colour' \(did you mean 'color'\?\)"),
        ({"category": None}, "row OCR.0.1: unknown category None"),
        ({"image": None}, "row OCR.0.1: no image_path"),
        ({"image": "other.png"}, "OCR/images/0.png has one question"),
    ],
)
def test_bad_rows(change: dict[str, str | None], message: str):
    rows = mme_rows({})
    fields = vars(rows[1]) | change
    with pytest.raises(UserError, match=message):
        score("MME", [rows[0], Row(**fields), *rows[2:]])


def test_a_sum_over_fewer_categories_is_refused():
    rows = [row for row in mme_rows({}) if row.category not in ("color", "scene")]
    with pytest.raises(UserError, match=r"MME: no rows of color, scene; .* sum over all 14"):
        score("MME", rows)
