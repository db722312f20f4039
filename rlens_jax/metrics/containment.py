"""Containment: OCRBench (Liu et al., arXiv:2305.07895; `vlmeval/dataset/image_vqa.py`, class `OCRBench`)."""

import math
from collections.abc import Sequence

from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.score import Aggregate, Row, mean_ratio, outcomes_by

FORMULA = "Handwritten Mathematical Expression Recognition"

GROUPS = {
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
"""The five groups of the benchmark's ten categories."""

_CATEGORIES = tuple(category for categories in GROUPS.values() for category in categories)
_POINTS = 1000


def contains_answer(row: Row) -> float:
    """1 when any reference occurs in the prediction.

    Formulas are compared without blanks and with their case, everything else in lower case and with blanks.
    Both without white space at their ends and with a line break as a blank. An empty reference occurs anywhere.

    Raises:
      UserError: the row's category is none of OCRBench's.
    """
    if row.category not in _CATEGORIES:
        raise UserError(
            f"OCRBench: row {row.index}: unknown category {row.category!r}"
            f"{suggest(row.category or '', _CATEGORIES)}; known: {', '.join(_CATEGORIES)}"
        )
    fold = _fold_formula if row.category == FORMULA else _fold_text
    prediction = fold(row.prediction)
    return float(any(fold(answer) in prediction for answer in row.answers))


def _fold_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _fold_text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def ocrbench(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """The number of right answers of 1000, which is VLMEvalKit's Final Score.

    For another number of rows the value stays on that scale, whereas the breakdown holds the right answers as
    counted: "Final Score", the five groups, and "category/..." for the ten categories.
    """
    names = tuple(row.index for row in rows)
    right = {
        category: math.fsum(outcomes)
        for category, outcomes in outcomes_by([row.category for row in rows], per_sample).items()
    }
    breakdown = {"Final Score": math.fsum(per_sample)}
    for group, categories in GROUPS.items():
        breakdown[group] = math.fsum(right.get(category, 0) for category in categories)
    breakdown |= {f"category/{category}": count for category, count in right.items()}
    return Aggregate((mean_ratio(_POINTS, names, per_sample),), breakdown, names, ("",) * len(rows))
