"""The table of scorers, and the rows that `score` refuses."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import SCORERS, score
from rlens_jax.metrics.text_metrics import FORMULA
from tests.metrics.benchmarks import hallusion_rows, mme_rows

ROWS = {
    "OCRBench": [Row("0", "x", ("x",), category=FORMULA)],
    "DocVQA_VAL": [Row("0", "x", ("x",))],
    "DocVQA_TEST": [Row("0", "x", ("x",))],
    "InfoVQA_VAL": [Row("0", "x", ("x",))],
    "InfoVQA_TEST": [Row("0", "x", ("x",))],
    "ChartQA_TEST": [Row("0", "x", ("x",), split="test_human")],
    "TextVQA_VAL": [Row("0", "x", ("x",) * 10)],
    "MME": mme_rows({}),
    "MMStar": [Row("0", "A", ("A",), options={"A": "x"})],
    "HallusionBench": hallusion_rows({("0", "0", "0"): 1}),
}


def test_every_dataset_has_a_scorer():
    assert list(SCORERS) == list(ROWS)


@pytest.mark.parametrize("dataset", ROWS)
def test_all_right_is_the_top_of_the_scale_and_all_wrong_the_bottom(dataset: str):
    rows = ROWS[dataset]
    right = score(dataset, rows)
    assert right.value == {"OCRBench": 1000, "MME": 2800}.get(dataset, 100)
    assert right.unit == {"OCRBench": "of 1000", "MME": "of 2800"}.get(dataset, "%")
    assert set(right.per_sample) == {1.0}
    assert right.dataset == dataset
    wrong = score(dataset, [Row(**vars(row) | {"prediction": "?"}) for row in rows])
    assert wrong.value == 0
    assert set(wrong.per_sample) == {0.0}


@pytest.mark.parametrize("dataset", ROWS)
def test_every_score_says_whose_rules_it_follows(dataset: str):
    assert score(dataset, ROWS[dataset]).harness == "VLMEvalKit rules, open-compass/VLMEvalKit @ e8e78f05"


@pytest.mark.parametrize("dataset", ROWS)
def test_the_value_is_the_sum_of_the_ratios(dataset: str):
    result = score(dataset, ROWS[dataset])
    assert sum(ratio.value for ratio in result.ratios) == pytest.approx(result.value)
    known = set(result.groups)
    assert all(set(ratio.numerators) | set(ratio.denominators) <= known for ratio in result.ratios)


def test_order_does_not_change_a_score():
    rows = [Row(str(n), "x" * (n % 7), ("x" * 5,)) for n in range(500)]
    assert score("DocVQA_VAL", rows).value == score("DocVQA_VAL", rows[::-1]).value


def test_columns_that_a_dataset_has_are_broken_down():
    rows = [Row("0", "x", ("x",), category="form"), Row("1", "y", ("x",), category="table"), Row("2", "x", ("x",))]
    assert score("DocVQA_VAL", rows).breakdown == {"category/form": 100, "category/table": 0}


@pytest.mark.parametrize(
    ("dataset", "hint"), [("DocVQA-VAL", r"\(did you mean 'DocVQA_VAL'\?\)"), ("POPE", "; known: OCRBench, DocVQA_VAL")]
)
def test_an_unknown_dataset_is_refused(dataset: str, hint: str):
    with pytest.raises(UserError, match=f"unknown dataset '{dataset}'.*{hint}"):
        score(dataset, [Row("0", "x", ("x",))])


@pytest.mark.parametrize("dataset", SCORERS)
def test_no_rows_are_refused(dataset: str):
    with pytest.raises(UserError, match=f"{dataset}: no rows to score"):
        score(dataset, [])


@pytest.mark.parametrize("name", ["DocVQA", "InfoVQA"])
def test_splits_whose_answers_are_not_published_are_refused(name: str):
    with pytest.raises(UserError, match=f"{name}_TEST: row 3 has no answers; .* server .* or score {name}_VAL"):
        score(f"{name}_TEST", [Row("3", "x", ())])


@pytest.mark.parametrize("dataset", [name for name in SCORERS if not name.endswith("VQA_TEST")])
def test_rows_without_answers_are_refused(dataset: str):
    with pytest.raises(UserError, match=f"{dataset}: row 3 has no answers; complete the row"):
        score(dataset, [*ROWS[dataset], Row("3", "x", ())])


@pytest.mark.parametrize("dataset", ROWS)
def test_a_row_twice_is_refused(dataset: str):
    rows = ROWS[dataset]
    with pytest.raises(UserError, match=f"{dataset}: index {rows[0].index} occurs 2 times"):
        score(dataset, [*rows, rows[0]])


def test_an_unanswered_question_is_wrong():
    """Without a prediction, not with an empty one: TextVQA compares texts without articles."""
    rows = [Row("0", "", ("a",) * 10), Row("1", "x", ("x",) * 10)]
    assert score("TextVQA_VAL", rows).per_sample == (1, 1)
    assert score("TextVQA_VAL", rows, {"0"}).per_sample == (0, 1)
