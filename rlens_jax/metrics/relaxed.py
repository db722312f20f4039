"""Relaxed accuracy: ChartQA.

Methani et al., arXiv:1909.00997, as VLMEvalKit computes it (`vlmeval/dataset/utils/vqa_eval.py`, after pix2struct).
"""

from rlens_jax.metrics.score import Row

TOLERANCE = 0.05
"""Largest relative error of a number; this much is still right."""


def relaxed_accuracy(row: Row) -> float:
    """1 when any reference is met: numbers within 5 %, anything else letter by letter, whatever the case.

    The prediction is stripped, the references are not.
    """
    prediction = row.prediction.strip()
    return float(any(_meets(answer, prediction) for answer in row.answers))


def _meets(answer: str, prediction: str) -> bool:
    number, reference = _number(prediction), _number(answer)
    # A reference of 0 has no relative error and is compared as text: "0.0" does not meet "0".
    if number is not None and reference:
        return abs(number - reference) / abs(reference) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    """The number that the text is, a percentage as a share; None when it is none.

    Whatever Python reads is a number: " 7 ", "1e3", "nan" and "inf" are, "1,000" and "$5" are not.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
