"""Answers to yes/no questions: MME and HallusionBench (`vlmeval/dataset/utils/yorn.py`, `YOrN_Extraction`).

VLMEvalKit can ask a language model about unclear answers; here, as with its `exact_matching`, they are wrong.
"""

from rlens_jax.errors import UserError
from rlens_jax.metrics.punctuation import remove_punctuation
from rlens_jax.metrics.score import Row


def extract_yes_no(prediction: str) -> str:
    """What the prediction says: "Yes" or "No" when only that one is among its words, else "Unknown"."""
    words = remove_punctuation(prediction.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def yes_no_accuracy(row: Row) -> float:
    """1 when the prediction says what the reference says.

    Raises:
      UserError: the reference is neither "Yes" nor "No".
    """
    if row.answers not in (("Yes",), ("No",)):
        raise UserError(f"row {row.index}: the answer must be 'Yes' or 'No', not {', '.join(map(repr, row.answers))}")
    return float(extract_yes_no(row.prediction) == row.answers[0])
