"""Multiple choice by hand: the one letter that stands alone near the end, "answer is B", or the one option's text."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.choice_metrics import choice_accuracy, extract_choice
from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score

OPTIONS = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}
"""18 letters, so that a text of more than 36 is too long."""

CASES = [
    # A letter that stands alone.
    ("A", "A"),
    ("B", "B"),
    ("C", "C"),
    ("D", "D"),
    ("E", "Z"),
    (" B\n", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("{B}", "B"),
    ("B)", "B"),
    ("B:", "B"),
    ("B,", "B"),
    ("B;", "B"),
    ("B!", "B"),
    ("**B**", "B"),
    ("#B", "B"),
    ("B. blue", "B"),
    ("(B) blue", "B"),
    ("Answer:B", "B"),
    ("The answer is (B)", "B"),
    ("The answer is (B).", "B"),
    ("Option B", "B"),
    ("B B B", "B"),
    # A letter next to other characters does not stand alone.
    ("'B'", "Z"),
    ('"B"', "Z"),
    ("`B`", "Z"),
    ("<B>", "Z"),
    ("B?", "Z"),
    ("B-", "Z"),
    ("option_B", "Z"),
    ("AB", "Z"),
    ("\uff22", "Z"),  # full-width B
    # In upper case.
    ("b", "Z"),
    ("(b)", "Z"),
    ("d.", "Z"),
    # One letter only.
    ("A or B", "Z"),
    ("A, B", "Z"),
    ("Not A but B", "Z"),
    # Among the last four words.
    ("B 2 3 4", "B"),
    ("B 2 3 4 5", "Z"),
    ("1 B 3 4 5", "B"),
    ("1 2 3 4 5 B", "B"),
    ("B. 2. 3. 4. 5.", "Z"),
    ("A dog is what I see", "Z"),
    ("A dog is what I see here A", "Z"),  # where it occurs first
    ("I think it must be B", "B"),
    # "answer is B", wherever, whatever the case, with asterisks but without brackets.
    ("The answer is B because of the way the sky is up there", "B"),
    ("the correct answer is **C** as one can see from the leaves", "C"),
    ("answer is (C) as one can see from the leaves of the trees", "Z"),
    ("The ANSWER IS d as far as one can tell from this", "D"),
    ("answer  is\nB and so on and so on and so on", "B"),
    ("answer: is B", "B"),  # as a word
    ("Not A, the answer is B", "B"),
    ("The answer is B, not A", "B"),
    ("First the answer is A and then the answer is B", "A"),
    ("answer is blue like any other sky on any other day", "B"),  # nothing ends the letter
    ("The answer is a bit unclear to anybody who looks at it", "A"),
    ("answer is E", "Z"),
    ("answers B to all of these questions here", "Z"),
    # A lone Z is a refusal; the text is not looked at.
    ("Z", "Z"),
    ("Z.", "Z"),
    ("Z red", "Z"),
    ("Z B", "B"),
    # Refusals, as they are spelt.
    ("Sorry, I can't help with images of people yet.", "Z"),
    ("Sorry, I can't help with images of people yet. B", "Z"),
    ("I can't process this file. B", "Z"),
    ("I can't process this file. red", "Z"),
    ("I'm sorry, but without the image provided B", "Z"),
    ("Cannot determine the answer", "Z"),
    ("Cannot determine the answer: B", "Z"),
    ("cannot determine the answer: B", "B"),
    # No answer from an API is no letter, but may be text.
    ("Failed to obtain answer via API", "Z"),
    ("Failed to obtain answer via API B", "Z"),
    ("Failed to obtain answer via API red", "A"),  # 35 letters
    # The text of one option.
    ("red", "A"),
    ("Red", "A"),
    ("It is blue", "B"),
    ("dark green", "C"),
    ("hundred", "A"),  # inside a word as well
    ("re d", "Z"),
    ("red and blue", "Z"),
    ("bluegreen", "Z"),
    ("purple", "Z"),
    ("", "Z"),
    ("   ", "Z"),
    # ... in at most twice the letters of all options.
    ("x" * 33 + "red", "A"),
    ("x" * 34 + "red", "Z"),
    ("red" + " " * 33, "A"),
    ("red" + " " * 34, "Z"),
    # A letter goes before text.
    ("A blue", "A"),
    ("red B", "B"),
    ("B is what others call blue", "B"),  # too early for a letter, but the text says it
]


@pytest.mark.parametrize(("prediction", "expected"), CASES)
def test_extract_choice(prediction: str, expected: str):
    assert extract_choice(prediction, OPTIONS) == expected


@pytest.mark.parametrize(
    ("options", "prediction", "expected"),
    [
        # A letter without option is no letter.
        ({"A": "red", "B": "blue"}, "C", "Z"),
        ({"A": "red", "B": "blue"}, "C red", "A"),
        ({"A": "red", "B": "blue"}, "B or C", "B"),
        ({"A": "red", "B": "blue"}, "answer is C", "Z"),
        ({"A": "red", "B": "blue"}, "answer is D not red", "Z"),  # and 19 letters are more than 14
        ({"B": "red", "D": "blue"}, "D", "D"),
        ({"E": "red"}, "E", "E"),
        # Options within options.
        ({"A": "car", "B": "race car"}, "car", "A"),
        ({"A": "car", "B": "race car"}, "race car", "Z"),
        ({"A": "1", "B": "12"}, "1", "A"),
        ({"A": "1", "B": "12"}, "12", "Z"),
        ({"A": "Yes", "B": "No"}, "yes", "A"),
        ({"A": "Yes", "B": "No"}, "not", "B"),
        ({"A": "NY", "B": "LA"}, "ny", "A"),
        # Twice the letters of those that there are.
        ({"A": "red"}, "is red", "A"),
        ({"A": "red"}, "is  red", "Z"),
    ],
)
def test_options(options: dict[str, str], prediction: str, expected: str):
    assert extract_choice(prediction, options) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("A", "A", 1), ("(A)", "A", 1), ("red", "A", 1), ("B", "A", 0), ("a", "A", 0), ("A or B", "A", 0), ("", "A", 0)],
)
def test_an_unclear_choice_is_wrong(prediction: str, answer: str, expected: float):
    assert choice_accuracy(Row("0", prediction, (answer,), options=OPTIONS)) == expected


def test_options_are_left_as_they_are():
    options = {"A": "Red", "B": "Blue"}
    extract_choice("red", options)
    assert options == {"A": "Red", "B": "Blue"}


def test_mmstar_is_the_mean_over_rows_not_over_categories():
    hits = {("math", "algebra"): [1, 0, 0, 0], ("math", "geometry"): [0], ("logic", "code"): [1]}
    rows = [
        Row(f"{l2}{n}", "A" if hit else "B", ("A",), category=category, l2_category=l2, options=OPTIONS)
        for (category, l2), outcomes in hits.items()
        for n, hit in enumerate(outcomes)
    ]
    result = score("MMStar", rows)
    assert result.value == pytest.approx(100 * 2 / 6)  # macro: (25 + 0 + 100) / 3
    assert result.breakdown == {
        "category/logic": 100,
        "category/math": 20,
        "l2_category/algebra": 25,
        "l2_category/code": 100,
        "l2_category/geometry": 0,
    }
    assert result.unit == "%"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("5", "A", ("A",)), "MMStar: row 5: no options"),
        (Row("5", "A", ("A", "B"), options=OPTIONS), "MMStar: row 5: 2 answers"),
    ],
)
def test_bad_rows(row: Row, message: str):
    with pytest.raises(UserError, match=message):
        score("MMStar", [row])
