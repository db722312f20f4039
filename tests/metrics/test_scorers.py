"""The table of scorers, and the rows that `score` refuses."""

from dataclasses import replace

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import RULES, Row
from rlens_jax.metrics.scorers import SCORERS, score
from rlens_jax.metrics.text_metrics import FORMULA
from rlens_jax.search.bootstrap import score_draws
from tests.metrics.benchmarks import hallusion_rows, mme_rows

CHOICE = [Row("0", "A", ("A",), options={"A": "x"})]
ROTATIONS = [
    Row(index, answer, (answer,), options={"A": "x", "B": "y"}, category=label, split="dev")
    for index, answer, label in (("5", "A", "first"), ("1000005", "B", "second"))
]
ROWS = {
    "OCRBench": [Row("0", "x", ("x",), category=FORMULA)],
    "DocVQA_VAL": [Row("0", "x", ("x",))],
    "DocVQA_TEST": [Row("0", "x", ("x",))],
    "InfoVQA_VAL": [Row("0", "x", ("x",))],
    "InfoVQA_TEST": [Row("0", "x", ("x",))],
    "ChartQA_TEST": [Row("0", "x", ("x",), split="test_human")],
    "TextVQA_VAL": [Row("0", "x", ("x",) * 10)],
    "MME": mme_rows({}),
    "MMStar": CHOICE,
    "HallusionBench": hallusion_rows({("0", "0", "0"): 1}),
    "POPE": [Row("0", "yes", ("Yes",), category="popular,random"), Row("1", "yes.", ("Yes",), category="adversarial")],
    "GQA_TestDev_Balanced": [Row("0", "x", ("x",))],
    **dict.fromkeys(("MMBench_DEV_EN", "MMBench_DEV_EN_V11", "MMBench_TEST_EN_V11"), ROTATIONS),
    "ScienceQA_VAL": CHOICE,
    "ScienceQA_TEST": CHOICE,
    "VizWiz": [Row("0", "x", ("x",) * 10)],
    "SEEDBench_IMG": CHOICE,
    "MMMU_DEV_VAL": [*(replace(row, split="validation") for row in CHOICE), Row("1", "7", ("7",), split="validation")],
    "AI2D_TEST": CHOICE,
    "AI2D_TEST_NO_MASK": CHOICE,
    "RealWorldQA": CHOICE,
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
    assert score(dataset, ROWS[dataset], rules="2025-01").harness.startswith("VLMEvalKit rules of 2025-01, before")


def test_rules_of_a_time():
    row = Row("0", "I think it is A because of this and that", ("A",), options={"A": "x", "B": "y"})
    assert [score("MMStar", [row], rules=rules).value for rules in RULES] == [0, 100]
    with pytest.raises(UserError, match=r"unknown rules '2025-02' \(did you mean '2025-01'\?\); known: 2026-08, 2025-01"):
        score("MMStar", [row], rules="2025-02")


def test_a_rotation_counts_only_with_its_question():
    """The breakdown has the columns of the first rotation."""
    wrong = [ROTATIONS[0], replace(ROTATIONS[1], prediction="A")]
    others = [replace(row, index=row.index.replace("5", "4"), category="other") for row in ROTATIONS]
    result = score("MMBench_DEV_EN", [*wrong, *others])
    assert (result.value, result.per_sample, result.groups) == (50, (1, 0, 1, 1), ("5", "5", "4", "4"))
    assert result.breakdown == {"split/dev": 50, "category/first": 0, "category/other": 100}
    grouped = [replace(row, index=str(7 + n), g_index="7") for n, row in enumerate(ROTATIONS)]
    assert score("MMBench_DEV_EN", grouped).groups == ("7", "7")
    with pytest.raises(UserError, match="MMBench_DEV_EN: row a1: the index must be a whole number"):
        score("MMBench_DEV_EN", [replace(ROTATIONS[0], index="a1")])


def test_the_score_of_mmmu_is_of_its_validation_split():
    rows = [
        Row(str(n), "B", ("AB"[n % 2],), split=("dev", "validation")[n > 1], options=CHOICE[0].options | {"B": "y"})
        for n in range(5)
    ]
    result = score("MMMU_DEV_VAL", rows)
    assert result.value == pytest.approx(100 / 3)
    assert result.breakdown == {"split/dev": 50, "split/validation": pytest.approx(100 / 3)}
    with pytest.raises(UserError, match="MMMU_DEV_VAL: no rows of the split 'validation', whose mean is the score"):
        score("MMMU_DEV_VAL", rows[:2])


def test_a_draw_without_anything_to_count():
    """Of two rows one has an F1, so a quarter of the draws has none: 0, as in the score."""
    rows = [Row("0", "yes", ("Yes",), category="random"), Row("1", "no", ("No",), category="random")]
    drawn = score_draws(score("POPE", rows), samples=400)
    assert set(drawn) == {0, 100}
    assert 0.15 < (drawn == 0).mean() < 0.35


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
    ("dataset", "hint"), [("DocVQA-VAL", r"\(did you mean 'DocVQA_VAL'\?\)"), ("MM-Bench", "; known: OCRBench, DocVQA_VAL")]
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
    said = [Row("0", "yes", ("No",), category="random"), Row("1", "yes", ("Yes",), category="random")]
    assert score("POPE", said).value == pytest.approx(200 / 3)
    assert score("POPE", said, {"0"}).value == 100  # as unclear
