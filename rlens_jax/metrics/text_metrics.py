"""Rules for free-text answers: ANLS, relaxed accuracy, containment, VQA accuracy and equality.

They follow VLMEvalKit, `vlmeval/dataset/utils/vqa_eval.py` unless a function names another file.
"""

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from rlens_jax.metrics.score import CURRENT, RULES, Aggregate, Row, Rules, check_category, mean_ratio, outcomes_by

ANLS_THRESHOLD = 0.5
"""Similarities below this score 0; exactly this much is kept."""
TOLERANCE = 0.05
"""Largest relative error of a right number, inclusive."""
ENOUGH = 3
"""Number of people whose agreement makes an answer right."""

FORMULA = "Handwritten Mathematical Expression Recognition"
OCRBENCH_GROUPS = {
    "Text Recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    FORMULA: (FORMULA,),
}
"""The five groups of OCRBench's ten categories."""
_OCRBENCH_CATEGORIES = tuple(category for categories in OCRBENCH_GROUPS.values() for category in categories)

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}

# GT-Vision-Lab/VQA lists each contraction under its spellings with one apostrophe missing. Left out are entries that map
# a word to itself or have capitals, which the lower-cased text never has.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED.split() for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the VQA evaluation

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD_WITHOUT_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")
# VLMEvalKit passes `re.UNICODE`, which is 32, where `re.sub` takes the number of replacements. A 33rd period stays;
# published numbers depend on it.
_PERIODS_REMOVED = 32


def anls(row: Row) -> float:
    """Average normalised Levenshtein similarity: DocVQA and InfoVQA (Biten et al., arXiv:1905.13648).

    1 minus the smallest normalised edit distance to a reference, or 0 when that is below `ANLS_THRESHOLD`.
    Case and runs of white space do not count in the distance. They do count in the length by which it is divided:
    VLMEvalKit takes the length of the unchanged strings, so blanks after a wrong answer raise its score. (A later
    VLMEvalKit divides by the length of the folded strings.)
    """
    similarity = 1 - min(_edit_distance(answer, row.prediction) for answer in row.answers)
    return 0.0 if similarity < ANLS_THRESHOLD else similarity


def _edit_distance(answer: str, prediction: str) -> float:
    """Normalised edit distance in [0, 1]; 0 between empty strings."""
    # In upper case as VLMEvalKit measures: a few letters (ß) become two.
    length = max(len(answer.upper()), len(prediction.upper()))
    folded = (" ".join(text.lower().split()) for text in (answer, prediction))
    return Levenshtein.distance(*folded) / length if length else 0.0


def relaxed_accuracy(row: Row, rules: Rules = RULES[CURRENT]) -> float:
    """Relaxed accuracy: ChartQA (Methani et al., arXiv:1909.00997, after pix2struct).

    1 when a reference matches: a number within 5 %, any other text letter by letter in any case. The prediction is
    stripped, the references are not.
    """
    prediction = row.prediction.strip()
    return float(any(_matches(answer, prediction, rules) for answer in row.answers))


def _matches(answer: str, prediction: str, rules: Rules) -> bool:
    number, base = _number(prediction), _number(answer)
    if rules.error_of == "prediction":
        number, base = base, number
    # A base of 0 has no relative error and is compared as text: "0.0" does not match "0".
    if number is not None and base:
        return abs(number - base) / abs(base) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    """The value of a number, a percentage divided by 100; None for other text.

    The syntax is Python's: " 7 ", "1e3", "nan" and "inf" are numbers, "1,000" and "$5" are not.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def contains_answer(row: Row) -> float:
    """Containment: OCRBench (Liu et al., arXiv:2305.07895; `vlmeval/dataset/image_vqa.py`, class `OCRBench`).

    1 when a reference occurs in the prediction. Formulas are compared without blanks and with their case, everything
    else in lower case and with blanks. White space at the ends is removed, and a line break counts as a blank. An empty
    reference occurs in every prediction. UserError for a category that OCRBench does not have.
    """
    check_category(row, _OCRBENCH_CATEGORIES)
    fold = _fold_formula if row.category == FORMULA else _fold_text
    prediction = fold(row.prediction)
    return float(any(fold(answer) in prediction for answer in row.answers))


def _fold_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _fold_text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def ocrbench(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """The number of right answers out of 1000, VLMEvalKit's Final Score.

    The value is scaled to 1000 for any number of rows. The breakdown holds counts of right answers: "Final Score", the
    five groups, and "category/..." for the ten categories.
    """
    names = tuple(row.index for row in rows)
    by_category = outcomes_by([row.category for row in rows], per_sample)
    right = {category: math.fsum(outcomes) for category, outcomes in by_category.items()}
    breakdown = {"Final Score": math.fsum(per_sample)}
    for group, categories in OCRBENCH_GROUPS.items():
        breakdown[group] = math.fsum(right.get(category, 0) for category in categories)
    breakdown |= {f"category/{category}": count for category, count in right.items()}
    return Aggregate((mean_ratio(1000, names, per_sample),), breakdown, names, ("",) * len(rows))


def vqa_accuracy(row: Row) -> float:
    """VQA accuracy: TextVQA and VizWiz (Antol et al., arXiv:1505.00468; VLMEvalKit's `vqa_score`).

    min(1, matches / 3), averaged over leaving out one person's answer at a time. With ten references, one match scores
    0.3, two 0.6, three 0.9, four or more 1.
    """
    prediction = normalise_answer(row.prediction)
    matches = [normalise_answer(answer) == prediction for answer in row.answers]
    agreeing = sum(matches)
    return math.fsum(min(1, (agreeing - left_out) / ENOUGH) for left_out in matches) / len(matches)


def exact_accuracy(row: Row) -> float:
    """Equality: GQA (Hudson and Manning, arXiv:1902.09506). The share of references that equal the prediction, both stripped
    and in lower case.
    """
    prediction = row.prediction.strip().lower()
    return sum(answer.strip().lower() == prediction for answer in row.answers) / len(row.answers)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation or articles, small numbers as digits, contractions with their apostrophe.

    Articles and numbers are whole words: "a" is removed, "a'" stays. `remove_punctuation` sees the stripped text.
    """
    text = remove_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def remove_punctuation(text: str) -> str:
    r"""Remove the marks ; / [ ] " { } ( ) = + \ _ - > < @ ` , ? ! and periods without a digit next to them.

    TextVQA and the yes/no benchmarks share this (`vlmeval/smp/misc.py`). A mark that touches a blank anywhere in `text`
    is deleted everywhere; any other mark becomes a blank. A comma between two digits, anywhere, deletes all marks.
    Apostrophes, colons and asterisks stay.
    """
    deletes_all = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in _MARKS:
        deleted = deletes_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    return _PERIOD_WITHOUT_DIGIT.sub("", result, count=_PERIODS_REMOVED)
