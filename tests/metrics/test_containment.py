"""OCRBench by hand: a reference occurs in the prediction; formulas without blanks and with case."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from rlens_jax.metrics.text_metrics import FORMULA, OCRBENCH_GROUPS, contains_answer

TEXT = [
    ("cat", ["cat"], 1),
    ("the cat sat", ["cat"], 1),
    ("concatenate", ["cat"], 1),  # inside a word as well
    ("cat", ["the cat"], 0),  # the prediction in the reference does not count
    ("ca", ["cat"], 0),
    ("c a t", ["cat"], 0),
    ("cta", ["cat"], 0),
    ("dog", ["cat"], 0),
    ("", ["cat"], 0),
    ("   ", ["cat"], 0),
    # Whatever the case.
    ("Cat", ["cat"], 1),
    ("cat", ["CAT"], 1),
    ("THE CAT", ["Cat"], 1),
    ("straße", ["STRASSE"], 0),  # lower case, not case folding
    ("Été", ["été"], 1),
    # White space at the ends goes, within it stays.
    ("cat", [" cat "], 1),
    ("  cat\n", ["cat"], 1),
    ("cat", ["\tcat\n"], 1),
    ("big cat", ["big cat"], 1),
    ("big  cat", ["big cat"], 0),
    ("big cat", ["big  cat"], 0),
    ("bigcat", ["big cat"], 0),
    ("big cat", ["bigcat"], 0),
    ("a big cat", [" big cat"], 1),
    ("abig cat", [" big cat"], 1),  # the blank before "big" was stripped
    # A line break is a blank; a tab and a carriage return are not.
    ("big\ncat", ["big cat"], 1),
    ("big cat", ["big\ncat"], 1),
    ("big\ncat", ["big\ncat"], 1),
    ("big\n\ncat", ["big cat"], 0),
    ("big\tcat", ["big cat"], 0),
    ("big\r\ncat", ["big cat"], 0),
    # Nothing else is folded.
    ("1000", ["1,000"], 0),
    ("1,000", ["1000"], 0),
    ("$5.00", ["5.00"], 1),
    ("5.00", ["$5.00"], 0),
    ("don't", ["dont"], 0),
    ("cat.", ["cat"], 1),
    ("two", ["2"], 0),
    ("120", ["12"], 1),
    ("\uff21\uff22", ["AB"], 0),  # full-width letters
    # Any of several references.
    ("cat", ["dog", "cat"], 1),
    ("cat", ["cat", "dog"], 1),
    ("cat dog", ["dog", "cat"], 1),  # counts once
    ("owl", ["dog", "cat"], 0),
    ("b", ["a", "b", "c"], 1),
    # An empty reference is in everything.
    ("cat", [""], 1),
    ("", [""], 1),
    ("", ["  "], 1),
    ("cat", ["dog", "\n"], 1),
]

FORMULAS = [
    ("x^2", ["x^2"], 1),
    ("y = x^2 + 1", ["x^2"], 1),
    ("x ^ 2", ["x^2"], 1),
    ("x^2", ["x ^ 2"], 1),
    ("x^{2}+y", ["x^{2} + y"], 1),
    (" x ^ 2\n+ 1 ", ["x^2+1"], 1),
    ("\\frac{a}{b}", ["\\frac {a} {b}"], 1),
    ("x ^ 3", ["x^2"], 0),
    # With case.
    ("X^2", ["x^2"], 0),
    ("x^2", ["X^2"], 0),
    ("\\Delta x", ["\\delta x"], 0),
    ("\\Delta x", ["\\Delta x"], 1),
    # Blanks and line breaks go, tabs only from the ends.
    ("x\n+\ny", ["x+y"], 1),
    ("x+y", ["x\n+ y"], 1),
    ("\tx+y\t", ["x+y"], 1),
    ("x\t+y", ["x+y"], 0),
    ("x\t+y", ["x\t+ y"], 1),
    ("", ["x"], 0),
    ("x", [" "], 1),
    ("x+y", ["z", "x + y"], 1),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), TEXT)
def test_text(prediction: str, answers: list[str], expected: float):
    row = Row("0", prediction, tuple(answers), category="Scene Text-centric VQA")
    assert contains_answer(row) == expected


@pytest.mark.parametrize(("prediction", "answers", "expected"), FORMULAS)
def test_formulas(prediction: str, answers: list[str], expected: float):
    assert contains_answer(Row("0", prediction, tuple(answers), category=FORMULA)) == expected


CATEGORIES = [category for categories in OCRBENCH_GROUPS.values() for category in categories]
SIZES = [50] * 6 + [200] * 3 + [100]


@pytest.mark.parametrize("category", CATEGORIES)
def test_only_formulas_lose_their_blanks_and_keep_their_case(category: str):
    formula = category == FORMULA
    assert contains_answer(Row("0", "x y", ("xy",), category=category)) == formula
    assert contains_answer(Row("0", "XY", ("xy",), category=category)) == (not formula)


def ocrbench_rows(sizes: list[int], right: list[int]) -> list[Row]:
    return [
        Row(f"{category}{n}", "cat" if n < hits else "dog", ("cat",), category=category)
        for category, size, hits in zip(CATEGORIES, sizes, right, strict=True)
        for n in range(size)
    ]


def test_ocrbench_counts_right_answers_of_a_thousand():
    result = score("OCRBench", ocrbench_rows(SIZES, [50, 40, 30, 20, 10, 0, 150, 100, 51, 7]))
    assert result.value == 458
    assert result.unit == "of 1000"
    assert len(result.per_sample) == 1000
    named = {name: count for name, count in result.breakdown.items() if not name.startswith("category/")}
    assert named == {
        "Final Score": 458,
        "Text Recognition": 150,
        "Scene Text-centric VQA": 150,
        "Doc-oriented VQA": 100,
        "Key Information Extraction": 51,
        FORMULA: 7,
    }
    assert result.breakdown["category/Irregular Text Recognition"] == 40
    assert result.breakdown["category/Non-Semantic Text Recognition"] == 0


def test_a_part_of_ocrbench_is_on_the_same_scale():
    result = score("OCRBench", ocrbench_rows([2] * 10, [2] * 5 + [0] * 5))
    assert result.value == 500
    assert result.breakdown["Final Score"] == 10
    assert result.breakdown["Text Recognition"] == 10


def test_a_group_without_rows_has_no_right_answers():
    rows = [Row("0", "cat", ("cat",), category=FORMULA)]
    assert score("OCRBench", rows).breakdown["Text Recognition"] == 0


@pytest.mark.parametrize(("category", "hint"), [("Doc-orientated VQA", "did you mean 'Doc-oriented VQA'"), (None, "None")])
def test_an_unknown_category_is_refused(category: str | None, hint: str):
    with pytest.raises(UserError, match=f"row 17: unknown category .*{hint}"):
        score("OCRBench", [Row("17", "cat", ("cat",), category=category)])
