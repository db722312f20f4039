"""Relaxed accuracy by hand: numbers within 5 % of the reference, anything else the same text."""

import pytest

from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from rlens_jax.metrics.text_metrics import relaxed_accuracy

CASES = [
    # Five percent of the reference, inclusive.
    ("100", ["100"], 1),
    ("105", ["100"], 1),
    ("95", ["100"], 1),
    ("105.01", ["100"], 0),
    ("94.99", ["100"], 0),
    ("21", ["20"], 1),
    ("104", ["100"], 1),
    ("0", ["100"], 0),
    ("-100", ["100"], 0),
    ("100", ["-100"], 0),
    ("-105", ["-100"], 1),
    ("-95", ["-100"], 1),
    ("-106", ["-100"], 0),
    # ... of the reference, not of the prediction.
    ("95.2", ["100"], 1),  # 4.8 % of 100, 5.04 % of 95.2
    ("105.2", ["100"], 0),  # 5.2 % of 100, 4.94 % of 105.2
    # ... in floating point.
    ("1.05", ["1"], 0),  # 0.050000000000000044
    ("0.95", ["1"], 0),  # 0.050000000000000044
    ("3.15", ["3"], 1),  # 0.04999999999999997
    # What Python reads as a number.
    (" 100 ", ["100"], 1),
    ("100\n", ["100"], 1),
    ("100", [" 100 "], 1),
    ("1e2", ["100"], 1),
    ("1E2", ["100"], 1),
    ("+100", ["100"], 1),
    ("100.", ["100"], 1),
    (".5", ["0.5"], 1),
    ("2.0", ["2"], 1),
    ("1_000", ["1000"], 1),
    ("1000", ["1_000"], 1),
    ("\u0663", ["3"], 1),  # Arabic digit three
    # What it does not.
    ("1,000", ["1000"], 0),
    ("1000", ["1,000"], 0),
    ("1,000", ["1,000"], 1),
    ("1,001", ["1,000"], 0),
    ("$5", ["5"], 0),
    ("$5", ["$5"], 1),
    ("5 kg", ["5"], 0),
    ("1/2", ["0.5"], 0),
    ("0x10", ["16"], 0),
    ("five", ["5"], 0),
    # Percentages are shares.
    ("50%", ["50%"], 1),
    ("52%", ["50%"], 1),
    ("53%", ["50%"], 0),
    ("0.5", ["50%"], 1),
    ("50%", ["0.5"], 1),
    ("50", ["50%"], 0),
    ("50%", ["50"], 0),
    ("50 %", ["50%"], 1),  # float("50 ")
    ("50%%", ["50%"], 1),  # all percent signs at the end go
    ("5e1%", ["50%"], 1),
    ("%50", ["50%"], 0),
    ("%", ["50%"], 0),
    ("%", ["%"], 1),  # no number, the same text
    ("50 percent", ["50%"], 0),
    # A reference of zero is text.
    ("0", ["0"], 1),
    (" 0 ", ["0"], 1),
    ("0", [" 0 "], 0),  # references are not stripped
    ("0.0", ["0"], 0),
    ("0", ["0.0"], 0),
    ("-0", ["0"], 0),
    ("0%", ["0"], 0),
    ("0", ["0%"], 0),
    ("0%", ["0%"], 1),
    ("0.001", ["0"], 0),
    ("0", ["0.001"], 0),
    # Neither nan nor inf is near anything, itself included.
    ("nan", ["nan"], 0),
    ("NaN", ["nan"], 0),
    ("nan", ["5"], 0),
    ("5", ["nan"], 0),
    ("inf", ["inf"], 0),
    ("infinity", ["Infinity"], 0),
    ("inf", ["5"], 0),
    ("5", ["inf"], 0),
    ("-inf", ["inf"], 0),
    ("inf%", ["inf%"], 0),
    ("nan", ["nan people"], 0),
    ("nancy", ["Nancy"], 1),
    # Text, whatever the case.
    ("Yes", ["yes"], 1),
    ("YES", ["yes"], 1),
    ("yes\n", ["Yes"], 1),
    ("yes", ["Yes "], 0),
    ("Yes.", ["yes"], 0),
    ("dark  blue", ["dark blue"], 0),
    ("STRASSE", ["straße"], 0),
    ("2013-2014", ["2013-2014"], 1),
    ("", [""], 1),
    ("", ["5"], 0),
    ("5", [""], 0),
    # Any of several references.
    ("5", ["4", "5"], 1),
    ("5", ["5", "9"], 1),
    ("5", ["4", "6"], 0),
    ("100", ["0", "103"], 1),
    ("Canada", ["USA", "canada"], 1),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), CASES)
def test_relaxed_accuracy(prediction: str, answers: list[str], expected: float):
    assert relaxed_accuracy(Row("0", prediction, tuple(answers))) == expected


def test_chartqa_is_the_mean_over_all_rows_and_has_both_splits():
    right = {"test_human": [1, 0, 0, 0], "test_augmented": [1, 1]}
    rows = [
        Row(f"{split}{n}", "7" if hit else "8", ("7",), split=split)
        for split, hits in right.items()
        for n, hit in enumerate(hits)
    ]
    result = score("ChartQA_TEST", rows)
    assert result.value == 50  # 3 of 6, not the mean of 25 and 100
    assert result.breakdown == {"split/test_augmented": 100, "split/test_human": 25}
    assert result.unit == "%"
