"""Which option an answer chooses: MMStar.

Chen et al., arXiv:2403.20330; `vlmeval/utils/matching_util.py` and `mcq_vanilla_eval` with the judge
`exact_matching`: where no option can be read out of an answer, VLMEvalKit can ask a language model; here it is wrong.
"""

import re
from collections.abc import Mapping

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Row

NONE = "Z"
"""VLMEvalKit's letter of no option."""

_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
# Nothing ends the letter: "answer is blue" says B.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def choice_accuracy(row: Row) -> float:
    """1 when the option that the prediction chooses is the reference.

    Raises:
      UserError: a row without options, or with other than one reference.
    """
    if not row.options:
        raise UserError(f"MMStar: row {row.index}: no options")
    if len(row.answers) != 1:
        raise UserError(f"MMStar: row {row.index}: {len(row.answers)} answers; a choice has one, its letter")
    return float(extract_choice(row.prediction, row.options) == row.answers[0])


def extract_choice(prediction: str, options: Mapping[str, str]) -> str:
    """The letter of the option that the prediction names by letter, or else by text; "Z" for none."""
    return _by_letter(prediction, options) or _by_text(prediction, options) or NONE


def _by_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """A letter that stands alone, in upper case, among the last four words; then "answer is B" anywhere.

    "Z" when the prediction refuses or has a lone "Z": then its text is not looked at.
    """
    if _API_FAILED in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return NONE
    words = prediction.translate(_TO_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    # Where a letter occurs first decides: "A dog is what I see here, A" does not say A.
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and NONE in words:
        return NONE
    said = _ANSWER_IS.search(prediction)
    return said[1].upper() if said and said[1].upper() in options else None


def _by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text occurs in the prediction, whatever the case; none in a long prediction."""
    prediction = prediction.lower()
    if len(prediction) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in prediction]
    return named[0] if len(named) == 1 else None
