"""ANLS, average normalised Levenshtein similarity: DocVQA and InfoVQA.

Biten et al., arXiv:1905.13648, as VLMEvalKit computes it (`vlmeval/dataset/utils/vqa_eval.py`).
"""

from rapidfuzz.distance import Levenshtein

from rlens_jax.metrics.score import Row

THRESHOLD = 0.5
"""Similarities below this score 0; one of exactly this much is kept."""


def anls(row: Row) -> float:
    """One minus the smallest normalised edit distance to a reference, 0 when that is below the threshold.

    Case and runs of white space do not count in the distance. They do count in the length it is divided by:
    VLMEvalKit takes that of the strings as given, so blanks after a wrong answer raise its score. (A later
    VLMEvalKit divides by the length of the folded strings.)
    """
    similarity = 1 - min(_distance(answer, row.prediction) for answer in row.answers)
    return 0.0 if similarity < THRESHOLD else similarity


def _distance(answer: str, prediction: str) -> float:
    """Normalised edit distance, float in [0, 1]; 0 between empty strings."""
    # In upper case as VLMEvalKit measures: a few letters (ß) become two.
    length = max(len(answer.upper()), len(prediction.upper()))
    return Levenshtein.distance(_fold(answer), _fold(prediction)) / length if length else 0.0


def _fold(text: str) -> str:
    return " ".join(text.lower().split())
