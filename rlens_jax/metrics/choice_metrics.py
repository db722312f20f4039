"""Rules for answers that choose: yes or no (MME, HallusionBench), and one of several options (MMStar).

VLMEvalKit can ask a language model about unclear answers. Here, as with its judge `exact_matching`, they are wrong.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Aggregate, Ratio, Row, check_category, mean_ratio
from rlens_jax.metrics.text_metrics import remove_punctuation

PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
_MME_CATEGORIES = PERCEPTION + REASONING

NO_OPTION = "Z"
"""VLMEvalKit's letter for no option."""
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Nothing ends the letter: "answer is blue" says B.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def yes_no_accuracy(row: Row) -> float:
    """1 when the prediction says what the reference says. UserError when the reference is neither "Yes" nor "No"."""
    if row.answers not in (("Yes",), ("No",)):
        raise UserError(f"row {row.index}: the answer must be 'Yes' or 'No', not {', '.join(map(repr, row.answers))}")
    return float(extract_yes_no(row.prediction) == row.answers[0])


def extract_yes_no(prediction: str) -> str:
    """The prediction's answer: "Yes" or "No" if it has only that word, else "Unknown" (`vlmeval/dataset/utils/yorn.py`)."""
    words = remove_punctuation(prediction.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def mme(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """MME's score (Fu et al., arXiv:2306.13394; `vlmeval/dataset/utils/yorn.py`, `MME_rating`).

    The sum over the 14 categories of acc (share of right answers) and acc+ (share of images with both answers right),
    both in percent. A category gives up to 200 and the whole up to 2800: perception (10 categories) plus reasoning (4;
    MME's paper calls it cognition). A group is an image of a category. Groups are drawn within their category: the
    categories are fixed by the benchmark. VLMEvalKit's acc+ uses the first two questions of an image that has more.

    Raises:
        UserError: a row has no image or an unknown category, an image has only one question, or a category has no rows
            (the sum of the others would be on another scale).
    """
    outcomes: dict[str, dict[str, list[float]]] = {category: defaultdict(list) for category in _MME_CATEGORIES}
    groups = []
    for row, outcome in zip(rows, per_sample, strict=True):
        category = check_category(row, _MME_CATEGORIES)
        if not row.image:
            raise UserError(f"row {row.index}: no image_path, which pairs the questions")
        groups.append(f"{category}/{row.image}")
        outcomes[category][groups[-1]].append(outcome)
    if missing := [category for category, images in outcomes.items() if not images]:
        raise UserError(f"no rows of {', '.join(missing)}; the score is a sum over all 14 categories")
    for images in outcomes.values():
        for image, pair in images.items():
            if len(pair) < 2:
                raise UserError(f"{image} has one question; keep the two questions of an image together")

    ratios = []
    breakdown: dict[str, float] = {}
    for category, images in outcomes.items():
        questions = [(image, outcome) for image, pair in images.items() for outcome in pair]
        accuracy = mean_ratio(100, *zip(*questions, strict=True))
        both = mean_ratio(100, images, (pair[0] * pair[1] for pair in images.values()))
        ratios += [accuracy, both]
        breakdown |= {
            f"category/{category}": accuracy.value + both.value,
            f"category/{category}/acc": accuracy.value,
            f"category/{category}/acc+": both.value,
        }
    for name, categories in (("perception", PERCEPTION), ("reasoning", REASONING)):
        breakdown[name] = math.fsum(breakdown[f"category/{category}"] for category in categories)
    strata = tuple(str(row.category) for row in rows)
    return Aggregate(tuple(ratios), breakdown, tuple(groups), strata)


@dataclass(frozen=True)
class _Ids:
    """Ids of a HallusionBench row: `group` is its set of figures and questions, the others are keys within it."""

    group: str
    figure: tuple[str, str]
    question: tuple[str, str]


def hallusion_bench(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """HallusionBench's score (Guan et al., arXiv:2310.14566; `vlmeval/dataset/utils/yorn.py`, `Hallusion_rating`).

    The mean of aAcc, fAcc and qAcc, in percent, which OpenCompass reports. aAcc is the share of right answers, fAcc the
    share of figures with all their questions right, qAcc the share of questions right on all their figures. Parts 4, 5
    and 6 of an index, split at "_", are the ids of set, figure and question; they are unique within an l2-category only.
    A group is a set, the smallest unit with whole figures and questions.

    The breakdown has the three shares over all rows and under "category/..." and "l2_category/...".

    Raises:
        UserError: an index lacks the ids, or a row lacks its l2-category.
    """
    ids = [_ids(row) for row in rows]
    ratios = _accuracies(ids, per_sample)
    breakdown = {name: ratio.value for name, ratio in ratios.items()}
    for field in ("category", "l2_category"):
        labels = [getattr(row, field) for row in rows]
        for label in sorted({label for label in labels if label is not None}):
            chosen = [number for number, other in enumerate(labels) if other == label]
            parts = _accuracies([ids[number] for number in chosen], [per_sample[number] for number in chosen])
            breakdown |= {f"{field}/{label}/{name}": ratio.value for name, ratio in parts.items()}
    thirds = tuple(Ratio(ratio.scale / 3, ratio.numerators, ratio.denominators) for ratio in ratios.values())
    return Aggregate(thirds, breakdown, tuple(place.group for place in ids), ("",) * len(rows))


def _ids(row: Row) -> _Ids:
    parts = row.index.split("_")
    if len(parts) < 6:
        raise UserError(
            f"row {row.index}: the index must have six parts joined by '_', "
            "the last three of them the ids of set, figure and question"
        )
    if row.l2_category is None:
        raise UserError(f"row {row.index}: no l2-category, without which its ids are not unique")
    group = f"{row.l2_category}_{parts[3]}"
    return _Ids(group, (group, parts[4]), (group, parts[5]))


def _accuracies(ids: Sequence[_Ids], hits: Sequence[float]) -> dict[str, Ratio]:
    ratios = {"aAcc": mean_ratio(100, (place.group for place in ids), hits)}
    for name, keys in (("fAcc", [place.figure for place in ids]), ("qAcc", [place.question for place in ids])):
        all_right: dict[tuple[str, str], float] = defaultdict(lambda: 1.0)
        for key, hit in zip(keys, hits, strict=True):
            all_right[key] = min(all_right[key], hit)
        ratios[name] = mean_ratio(100, (group for group, _ in all_right), all_right.values())
    return ratios


def choice_accuracy(row: Row) -> float:
    """Multiple choice: MMStar (Chen et al., arXiv:2403.20330; `mcq_vanilla_eval`).

    1 when the option that the prediction chooses is the reference. UserError without options, or without exactly one reference.
    """
    if not row.options:
        raise UserError(f"row {row.index}: no options")
    if len(row.answers) != 1:
        raise UserError(f"row {row.index}: {len(row.answers)} answers; a choice has one, its letter")
    return float(extract_choice(row.prediction, row.options) == row.answers[0])


def extract_choice(prediction: str, options: Mapping[str, str]) -> str:
    """The letter of the option that the prediction names by letter, or else by text; "Z" for none (`utils/matching_util.py`)."""
    return _by_letter(prediction, options) or _by_text(prediction, options) or NO_OPTION


def _by_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """A letter that stands alone, in upper case, among the last four words; then "answer is B" anywhere.

    "Z" when the prediction refuses or has a lone "Z"; its text is not searched then.
    """
    if _API_FAILED in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return NO_OPTION
    words = prediction.translate(_TO_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    # The first place of a letter decides: "A dog is what I see here, A" does not say A.
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]
    if not letters and NO_OPTION in words:
        return NO_OPTION
    answer = _ANSWER_IS.search(prediction)
    return answer[1].upper() if answer and answer[1].upper() in options else None


def _by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text occurs in the prediction, in any case; None in a long prediction."""
    prediction = prediction.lower()
    if len(prediction) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in prediction]
    return named[0] if len(named) == 1 else None
