"""ANLS by hand: 1 - distance / length, where the distance folds case and white space and the length does not."""

import pytest

from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from rlens_jax.metrics.text_metrics import anls

CASES = [
    # The same but for case and white space.
    ("cat", ["cat"], 1),
    ("Cat", ["cat"], 1),
    ("cat", ["CAT"], 1),
    (" cat", ["cat"], 1),
    ("cat\n", ["cat"], 1),
    ("cat", ["  cat  "], 1),
    ("a  b", ["a b"], 1),
    ("a\tb", ["a b"], 1),
    ("a\nb", ["A B"], 1),
    ("\u00a0cat", ["cat"], 1),  # a no-break space is white space to Python
    ("42", ["42"], 1),
    ("日本", ["日本"], 1),
    # Empty.
    ("", [""], 1),
    ("   ", [""], 1),
    ("", ["   "], 1),
    ("", ["cat"], 0),
    ("cat", [""], 0),
    ("   ", ["cat"], 0),  # 3 / 3
    ("    ", ["cat"], 0),  # 3 / 4
    ("      ", ["cat"], 0.5),  # 3 / 6: six blanks score half
    ("       ", ["cat"], 4 / 7),
    # The threshold: a half is kept, anything below is not.
    ("ab", ["ac"], 0.5),
    ("abcd", ["abxy"], 0.5),
    ("abcdef", ["abcxyz"], 0.5),
    ("abc", ["abd"], 2 / 3),
    ("abc", ["axy"], 0),  # 1 / 3
    ("abcde", ["abxyz"], 0),  # 2 / 5
    ("abcde", ["abcyz"], 3 / 5),
    ("abcdefg", ["abcwxyz"], 0),  # 3 / 7
    ("a" * 50 + "b" * 50, ["a" * 100], 0.5),
    ("a" * 50 + "b" * 51, ["a" * 101], 0),  # 50 / 101
    ("a" * 51 + "b" * 50, ["a" * 101], 51 / 101),
    # Insertion, deletion, substitution; a transposition is two edits.
    ("cats", ["cat"], 3 / 4),
    ("ca", ["cat"], 2 / 3),
    ("cot", ["cat"], 2 / 3),
    ("act", ["cat"], 0),  # 2 / 3 away
    ("12", ["21"], 0),
    ("kitten", ["sitting"], 4 / 7),
    ("saturday", ["sunday"], 5 / 8),
    ("flaw", ["lawn"], 0.5),
    ("intention", ["execution"], 0),  # 5 / 9 away
    ("日本語", ["日本"], 2 / 3),
    # Nothing else is folded: punctuation, articles, numbers.
    ("$5.00", ["5.00"], 4 / 5),
    ("1,000", ["1000"], 4 / 5),
    ("1000.0", ["1000"], 4 / 6),
    ("42%", ["42"], 2 / 3),
    ("yes.", ["yes"], 3 / 4),
    ("don't", ["dont"], 4 / 5),
    ("The cat", ["cat"], 0),  # 4 / 7 away
    ("two", ["2"], 0),
    ("e\u0301", ["\u00e9"], 0),  # an accent of its own and a letter with accent: two edits of two
    # The length is that of the strings as given: blanks make a wrong answer less wrong.
    ("xyz", ["abc"], 0),
    ("xyz  ", ["abc"], 0),  # 3 / 5 away
    ("xyz   ", ["abc"], 0.5),
    ("   xyz", ["abc"], 0.5),
    ("xyz     ", ["abc"], 5 / 8),
    ("xyz", ["abc     "], 5 / 8),
    ("cats ", ["cat"], 4 / 5),  # not 3 / 4
    ("a   b", ["a c"], 4 / 5),  # not 2 / 3
    ("cat\n\n", ["car"], 4 / 5),
    ("ab ", ["cd"], 0),  # 2 / 3 away
    ("ab  ", ["cd"], 0.5),
    # ... in upper case, where some letters become two.
    ("ß", ["a"], 0.5),  # 1 / len("SS")
    ("\ufb01", ["x"], 0.5),  # the ligature fi: 1 / len("FI")
    ("STRASSE", ["straße"], 5 / 7),  # the distance is in lower case: ß and ss are 2 apart
    ("İ", ["i"], 0),  # lower case is two code points, upper case one: 1 / 1 away
    # The nearest of several references.
    ("cat", ["dog", "cat"], 1),
    ("cat", ["cat", "dog"], 1),
    ("cart", ["cat", "care"], 3 / 4),
    ("abcd", ["abxy", "abcx"], 3 / 4),
    ("abcd", ["wxyz", "abyz"], 0.5),
    ("abcd", ["wxyz", "axyz"], 0),
    ("", ["cat", ""], 1),
    # Nearest by normalised distance: 4 edits of 12 are nearer than 3 of 8.
    ("abcdefgh", ["abcdexyz", "abcdefghijkl"], 8 / 12),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), CASES)
def test_anls(prediction: str, answers: list[str], expected: float):
    assert anls(Row("0", prediction, tuple(answers))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dataset", ["DocVQA_VAL", "InfoVQA_VAL"])
def test_a_dataset_is_the_mean_in_percent(dataset: str):
    predictions = ["cat", "ca ", "xyz", "cats"]  # 1, 2 / 3, 0, 3 / 4
    result = score(dataset, [Row(str(n), text, ("cat",)) for n, text in enumerate(predictions)])
    assert result.per_sample == pytest.approx((1, 2 / 3, 0, 3 / 4))
    assert result.value == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 4)
    assert result.unit == "%"
    assert result.breakdown == {}
