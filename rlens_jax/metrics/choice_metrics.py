"""Rules for answers that choose: yes or no (MME, HallusionBench, POPE), and one of several options (MMStar and others).

VLMEvalKit can ask a language model about unclear answers. Here, as with its judge `exact_matching`, they are wrong.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import (
    CURRENT,
    RULES,
    Aggregate,
    Ratio,
    Row,
    Rules,
    check_category,
    mean_ratio,
    means_by_column,
    sum_ratio,
)
from rlens_jax.metrics.text_metrics import remove_punctuation

PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
_MME_CATEGORIES = PERCEPTION + REASONING
POPE_CATEGORIES = ("adversarial", "popular", "random")
ROTATION = 10**6
"""Rotation k of the options of question i has the index i + k * ROTATION."""
OTHER_ANSWERS = "Other Answers"
"""VLMEvalKit's second option of an open question; the first is the reference."""
HEADLINE_SPLIT = "validation"
"""The split of MMMU that its score is of."""

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
_CAPITAL = re.compile("[A-Z]")
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


def pope(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """POPE's score (Li et al., arXiv:2305.10355; `vlmeval/dataset/utils/yorn.py`, `POPE_rating`): F1 of "Yes", in percent.

    A row counts once for each of its categories, which commas join; without a category it counts in the score only. An unclear
    answer counts as "No" here, but is wrong in `acc`. A quotient without anything to count is 0. A group is a row.

    The breakdown has "acc", "precision" and "recall", and the F1 and the same of each category under "category/...".

    Raises:
        UserError: a row has an unknown category.
    """
    counts: list[_Count] = []
    by_category: dict[str, list[_Count]] = defaultdict(list)
    for row, hit in zip(rows, per_sample, strict=True):
        count = (row.index, row.answers[0] == "Yes", extract_yes_no(row.prediction) == "Yes", hit)
        if row.category is None:
            counts.append(count)
            continue
        for category in row.category.split(","):
            counts.append(count)
            by_category[check_category(replace(row, category=category), POPE_CATEGORIES)].append(count)
    f1, others = _detection(counts)
    breakdown = dict(others)
    for category, chosen in sorted(by_category.items()):
        of_category, others = _detection(chosen)
        breakdown[f"category/{category}"] = of_category.value
        breakdown |= {f"category/{category}/{name}": value for name, value in others.items()}
    return Aggregate((f1,), breakdown, tuple(row.index for row in rows), ("",) * len(rows))


_Count = tuple[str, bool, bool, float]
"""Group of a row; whether its reference and its prediction are "Yes"; whether the prediction is right."""


def _detection(counts: Sequence[_Count]) -> tuple[Ratio, dict[str, float]]:
    """The F1 of "Yes"; accuracy, precision and recall."""
    f1 = sum_ratio(100, ((group, 2.0 * (yes and said), yes + said) for group, yes, said, _ in counts))
    others = {
        "acc": sum_ratio(100, ((group, hit, 1) for group, _, _, hit in counts)),
        "precision": sum_ratio(100, ((group, yes and said, said) for group, yes, said, _ in counts)),
        "recall": sum_ratio(100, ((group, yes and said, yes) for group, yes, said, _ in counts)),
    }
    return f1, {name: ratio.value for name, ratio in others.items()}


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


def choice_accuracy(row: Row, rules: Rules = RULES[CURRENT]) -> float:
    """Multiple choice (`mcq_vanilla_eval`): MMStar, MMBench, ScienceQA, SEED-Bench, AI2D, RealWorldQA.

    1 when the option that the prediction chooses is the reference. UserError without options, or without exactly one reference.
    """
    if not row.options:
        raise UserError(f"row {row.index}: no options")
    if len(row.answers) != 1:
        raise UserError(f"row {row.index}: {len(row.answers)} answers; a choice has one, its letter")
    return float(extract_choice(row.prediction, row.options, rules) == row.answers[0])


def open_choice_accuracy(row: Row, rules: Rules = RULES[CURRENT]) -> float:
    """`choice_accuracy` of MMMU (Yue et al., arXiv:2311.16502), whose open questions are made a choice.

    Without option A, this is the reference and B is `OTHER_ANSWERS`. A reference that is no single capital stands for A.
    """
    if len(row.answers) == 1 and "A" not in row.options:
        row = replace(row, options={**row.options, "A": row.answers[0], "B": OTHER_ANSWERS})
    if len(row.answers) == 1 and not _CAPITAL.fullmatch(row.answers[0]):
        row = replace(row, answers=("A",))
    return choice_accuracy(row, rules)


def mmmu(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """100 times the mean over the rows of the split `HEADLINE_SPLIT`; UserError without any. The breakdown has all rows."""
    chosen = [(row.index, hit) for row, hit in zip(rows, per_sample, strict=True) if row.split == HEADLINE_SPLIT]
    if not chosen:
        raise UserError(f"no rows of the split {HEADLINE_SPLIT!r}, whose mean is the score")
    ratio = mean_ratio(100, *zip(*chosen, strict=True))
    strata = tuple(row.split or "" for row in rows)
    return Aggregate((ratio,), means_by_column(rows, per_sample), tuple(row.index for row in rows), strata)


def circular(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """MMBench (Liu et al., arXiv:2307.06281; `mcq_circular_eval`): the share of questions with all rotations right, in percent.

    Columns of the first rotation decide a question's place in the breakdown. A group is a question.

    Raises:
        UserError: an index is no whole number, or a question lacks a rotation of its options.
    """
    groups = tuple(circular_group(row.index, row.g_index) for row in rows)
    check_rotations((group, row.index, len(row.options)) for group, row in zip(groups, rows, strict=True))
    hits = dict.fromkeys(groups, 1.0)
    for group, hit in zip(groups, per_sample, strict=True):
        hits[group] = min(hits[group], hit)
    first = [row for group, row in zip(groups, rows, strict=True) if group == row.index]
    breakdown = means_by_column(first, [hits[row.index] for row in first])
    return Aggregate((mean_ratio(100, hits, hits.values()),), breakdown, groups, ("",) * len(rows))


def circular_group(index: str, g_index: str | None) -> str:
    """The index of the first rotation of a question. UserError if `index` is no whole number."""
    if not index.isdecimal():
        raise UserError(f"row {index}: the index must be a whole number, which tells the rotations of a question")
    return str(int(index) % ROTATION) if g_index is None else g_index


def check_rotations(rows: Iterable[tuple[str, str, int]]) -> None:
    """Raise UserError unless every question has a row for each rotation of its options; VLMEvalKit does not notice.

    Args:
        rows: group, index and number of options of each row.
    """
    questions: dict[str, dict[str, int]] = defaultdict(dict)
    for group, index, num_options in rows:
        questions[group][index] = num_options
    for group, members in questions.items():
        turns = [int(index) // ROTATION for index in members if circular_group(index, None) == group]
        needed = max(*members.values(), 1 + max(turns, default=0))
        if group not in members or len(members) < needed:
            raise UserError(
                f"question {group} has {len(members)} of its {needed} rotations (rows {', '.join(members)}); "
                "a question of a circular benchmark needs all"
            )


def extract_choice(prediction: str, options: Mapping[str, str], rules: Rules = RULES[CURRENT]) -> str:
    """The letter of the option that the prediction names by letter, or else by text; "Z" for none (`utils/matching_util.py`)."""
    return _by_letter(prediction, options, rules) or _by_text(prediction, options, rules) or NO_OPTION


def _by_letter(prediction: str, options: Mapping[str, str], rules: Rules) -> str | None:
    """A letter that stands alone, in upper case, among the last words; then "answer is B" anywhere.

    "Z" when the prediction refuses or has a lone "Z"; its text is not searched then.
    """
    if _API_FAILED in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return NO_OPTION
    words = prediction.translate(_TO_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    # The first place of a letter decides: "A dog is what I see here, A" does not say A.
    if len(letters) == 1 and (rules.last_words is None or words.index(letters[0]) >= len(words) - rules.last_words):
        return letters[0]
    if not letters and NO_OPTION in words:
        return NO_OPTION
    answer = _ANSWER_IS.search(prediction) if rules.answer_is else None
    return answer[1].upper() if answer and answer[1].upper() in options else None


def _by_text(prediction: str, options: Mapping[str, str], rules: Rules) -> str | None:
    """The only option whose text occurs in the prediction, in any case; None in a long prediction."""
    prediction = prediction.lower()
    if rules.text_factor is not None and len(prediction) > rules.text_factor * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in prediction]
    return named[0] if len(named) == 1 else None
