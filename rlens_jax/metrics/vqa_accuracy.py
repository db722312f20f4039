"""VQA soft accuracy: TextVQA.

Antol et al., arXiv:1505.00468, as VLMEvalKit computes it (`vlmeval/dataset/utils/vqa_eval.py`, `vqa_score`).
"""

import math

from rlens_jax.metrics.contractions import CONTRACTIONS
from rlens_jax.metrics.punctuation import remove_punctuation
from rlens_jax.metrics.score import Row

ENOUGH = 3
"""So many people who say the same make an answer right."""

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def vqa_accuracy(row: Row) -> float:
    """min(1, matches / 3), averaged over leaving out one person's answer at a time.

    With ten references, one match scores 0.3, two 0.6, three 0.9, four and more 1.
    """
    prediction = normalise_answer(row.prediction)
    matches = [normalise_answer(answer) == prediction for answer in row.answers]
    agreeing = sum(matches)
    return math.fsum(min(1, (agreeing - left_out) / ENOUGH) for left_out in matches) / len(matches)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation and articles, small numbers as digits, contractions with apostrophe.

    Articles and numbers are whole words: "a" goes, "a'" stays. The blanks that decide what becomes of a
    mark are those left after stripping.
    """
    text = remove_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
