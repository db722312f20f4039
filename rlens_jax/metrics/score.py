"""The rows that scorers read, and the scores that they return."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from rlens_jax.errors import UserError, suggest


@dataclass(frozen=True)
class Rules:
    """VLMEvalKit's rules at a time. They differ in multiple choice and in relaxed accuracy (ChartQA) only.

    Attributes:
        harness: the source, part of every `Score`, to be named with its value.
        last_words: words at the end of a prediction among which a letter counts; None: all.
        text_factor: the text of an option counts in predictions of at most this many times the letters of all options; None: in
            all.
        answer_is: whether "answer is B" counts anywhere.
        error_of: the number that a numeric error is relative to.
    """

    harness: str
    last_words: int | None
    text_factor: int | None
    answer_is: bool
    error_of: Literal["reference", "prediction"]


CURRENT = "2026-08"
RULES: Mapping[str, Rules] = MappingProxyType(
    {
        CURRENT: Rules("VLMEvalKit rules, open-compass/VLMEvalKit @ e8e78f05", 4, 2, True, "reference"),
        # Before the changes of 2025-08-04 (c3371551), 2025-09-01 (677e30a5) and 2026-06-17 (a67ace50).
        "2025-01": Rules(
            "VLMEvalKit rules of 2025-01, before open-compass/VLMEvalKit @ c3371551", None, None, False, "prediction"
        ),
    }
)
"""By the month that published numbers name."""


@dataclass(frozen=True)
class Row:
    """One question of a benchmark's TSV file with a model's answer.

    Attributes:
        index: the row's `index`, as text. HallusionBench's contains the ids of set, figure and question.
        prediction: the model's answer as generated; each rule strips and folds it as needed.
        answers: the references. Ten for TextVQA and VizWiz, one for ChartQA, yes or no, and multiple choice (a letter, or the
            text of an open question); none where the makers withhold them.
        category: POPE's may be several, joined by commas.
        l2_category: MMStar, HallusionBench, MMBench, MMMU.
        split: ChartQA (`test_human` or `test_augmented`), ScienceQA, MMBench, MMMU (`dev` or `validation`).
        image: MME's `image_path`, which the two questions of a pair share.
        options: multiple choice, text per letter, without letters that have no text.
        g_index: MMBench, the index of the first rotation of the question, if its file says so.
    """

    index: str
    prediction: str
    answers: tuple[str, ...]
    category: str | None = None
    l2_category: str | None = None
    split: str | None = None
    image: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    g_index: str | None = None


@dataclass(frozen=True)
class Ratio:
    """`scale` times a quotient of two sums over groups of rows. Every score here is a sum of ratios.

    A mean is one ratio, MME's score the sum of 28, and F1 a ratio of counts. The sums are kept per group so that a bootstrap
    can weigh groups.
    """

    scale: float
    numerators: Mapping[str, float]
    denominators: Mapping[str, float]

    @property
    def value(self) -> float:
        """The ratio, of exactly rounded sums: the order of the rows cannot change a score. 0 if there is nothing to count."""
        total = math.fsum(self.denominators.values())
        return self.scale * math.fsum(self.numerators.values()) / total if total else 0.0


def mean_ratio(scale: float, groups: Iterable[str], outcomes: Iterable[float]) -> Ratio:
    """`scale` times the mean of the outcomes; `groups` names the group of each outcome."""
    return sum_ratio(scale, ((group, outcome, 1) for group, outcome in zip(groups, outcomes, strict=True)))


def sum_ratio(scale: float, terms: Iterable[tuple[str, float, float]]) -> Ratio:
    """`scale` times a quotient of sums, of a term's group, numerator and denominator."""
    numerators: dict[str, float] = defaultdict(float)
    denominators: dict[str, float] = defaultdict(float)
    for group, numerator, denominator in terms:
        numerators[group] += numerator
        denominators[group] += denominator
    return Ratio(scale, dict(numerators), dict(denominators))


def outcomes_by(labels: Sequence[str | None], outcomes: Sequence[float]) -> dict[str, list[float]]:
    """The outcomes per label, labels sorted; rows without a label are left out."""
    by_label: dict[str, list[float]] = defaultdict(list)
    for label, outcome in zip(labels, outcomes, strict=True):
        if label is not None:
            by_label[label].append(outcome)
    return {label: by_label[label] for label in sorted(by_label)}


def means_by_column(rows: Sequence[Row], outcomes: Sequence[float]) -> dict[str, float]:
    """The breakdown of a mean: 100 times the mean per split, category and l2-category."""
    return {
        f"{column}/{label}": 100 * math.fsum(of_label) / len(of_label)
        for column in ("split", "category", "l2_category")
        for label, of_label in outcomes_by([getattr(row, column) for row in rows], outcomes).items()
    }


def check_category(row: Row, categories: Sequence[str]) -> str:
    """The row's category. UserError unless it is one of `categories`."""
    if row.category is None or row.category not in categories:
        raise UserError(
            f"row {row.index}: unknown category {row.category!r}"
            f"{suggest(row.category or '', categories)}; known: {', '.join(categories)}"
        )
    return row.category


@dataclass(frozen=True)
class Aggregate:
    """The score of a dataset in parts.

    Attributes:
        ratios: their values add up to the dataset's score.
        breakdown: parts of the score by name: "perception", "category/color/acc+", "split/test_human", ...
        groups: the group of each row. A bootstrap draws or leaves out whole groups.
        strata: the stratum of each row. A draw keeps the number of groups per stratum.
    """

    ratios: tuple[Ratio, ...]
    breakdown: Mapping[str, float]
    groups: tuple[str, ...]
    strata: tuple[str, ...]


@dataclass(frozen=True)
class Score(Aggregate):
    """A dataset's score and its parts.

    Attributes:
        dataset: VLMEvalKit's name.
        value: the score on its published scale, in `unit`.
        unit: "%", "of 1000" (OCRBench) or "of 2800" (MME).
        per_sample: the score of each row, in [0, 1], in the order of the rows.
        harness: the source of the rules; see `Rules`.
    """

    dataset: str
    value: float
    unit: str
    per_sample: tuple[float, ...]
    harness: str
