"""Yes and no by hand: one of them among the words that are left without punctuation, and not the other."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.metrics.choice_metrics import extract_yes_no, yes_no_accuracy
from rlens_jax.metrics.score import Row

CASES = [
    ("Yes", "Yes"),
    ("No", "No"),
    ("yes", "Yes"),
    ("no", "No"),
    ("YES", "Yes"),
    ("nO", "No"),
    (" yes ", "Yes"),
    ("\nNo\n", "No"),
    ("Yes.", "Yes"),
    ("No.", "No"),
    ("Yes!", "Yes"),
    ("no?", "No"),
    ("Yes, it is.", "Yes"),
    ("No, it is red.", "No"),
    ("No; it is red", "No"),
    ("Answer: yes", "Yes"),
    ("The answer is no", "No"),
    ("I would say yes", "Yes"),
    ("yes yes yes", "Yes"),
    ("no no", "No"),
    ("(yes)", "Yes"),
    ("[No]", "No"),
    ('"Yes"', "Yes"),
    ("`no`", "No"),
    ("{yes}", "Yes"),
    ("<no>", "No"),
    ("yes\tof course", "Yes"),
    ("no\nsuch thing", "No"),
    ("-yes", "Yes"),
    ("No...", "No"),
    ("...yes", "Yes"),
    ("Yes-it-is", "Yes"),  # a mark that touches no blank becomes one
    ("no_way", "No"),
    # Both, or neither.
    ("yes and no", "Unknown"),
    ("Yes or no?", "Unknown"),
    ("yes/no", "Unknown"),
    ("Yes,no", "Unknown"),
    ("No, wait, yes", "Unknown"),
    ("There is no doubt: yes", "Unknown"),
    ("", "Unknown"),
    ("   ", "Unknown"),
    ("maybe", "Unknown"),
    ("The cat is black.", "Unknown"),
    ("y", "Unknown"),
    ("n", "Unknown"),
    ("true", "Unknown"),
    ("1", "Unknown"),
    # Words, not parts of words.
    ("not sure", "Unknown"),
    ("Not at all", "Unknown"),
    ("nope", "Unknown"),
    ("none", "Unknown"),
    ("yesterday", "Unknown"),
    ("eyes", "Unknown"),
    ("noyes", "Unknown"),
    ("I know", "Unknown"),
    ("nothing, yes", "Yes"),
    ("not sure, no", "No"),
    # No marks of punctuation: : ' *
    ("Yes: it is", "Unknown"),
    ("'no'", "Unknown"),
    ("**Yes**", "Unknown"),
    ("yes's", "Unknown"),
    ("yes :", "Yes"),
    # Marks that touch a blank anywhere are deleted and join words.
    ("yes-it -", "Unknown"),  # "yesit "
    ("no/yes /", "Unknown"),  # "noyes "
    ("yes,it is, well", "Unknown"),
    # A comma between digits has all marks deleted.
    ("yes-1,000", "Unknown"),
    ("yes 1,000", "Yes"),
    ("no,1,000", "Unknown"),
    # Periods join words; next to a digit they stay.
    ("Yes.No", "Unknown"),
    ("Yes.It is", "Unknown"),
    ("yes. no", "Unknown"),
    ("Yes.1", "Unknown"),
    ("1.yes", "Unknown"),
    ("1. Yes", "Yes"),
    # 32 periods are removed, no more.
    ("yes" + "." * 32, "Yes"),
    ("yes" + "." * 33, "Unknown"),
    ("." * 33 + " no", "No"),
    # Other languages and forms.
    ("oui", "Unknown"),
    ("\uff2e\uff4f", "Unknown"),  # full-width No
    ("是", "Unknown"),
]


@pytest.mark.parametrize(("prediction", "expected"), CASES)
def test_extract_yes_no(prediction: str, expected: str):
    assert extract_yes_no(prediction) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("yes", "Yes", 1),
        ("No.", "No", 1),
        ("yes", "No", 0),
        ("no", "Yes", 0),
        ("yes and no", "Yes", 0),
        ("yes and no", "No", 0),
        ("not sure", "No", 0),
        ("", "No", 0),
    ],
)
def test_an_unclear_answer_is_wrong(prediction: str, answer: str, expected: float):
    assert yes_no_accuracy(Row("0", prediction, (answer,))) == expected


@pytest.mark.parametrize("answers", [("yes",), ("True",), ("Yes", "No")])
def test_a_reference_is_yes_or_no(answers: tuple[str, ...]):
    with pytest.raises(UserError, match="row 5: the answer must be 'Yes' or 'No', not "):
        yes_no_accuracy(Row("5", "yes", answers))
