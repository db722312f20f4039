"""The rows that scorers read, and the scores that they return."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlens_jax.errors import UserError, suggest

HARNESS = "VLMEvalKit rules, open-compass/VLMEvalKit @ e8e78f05"
"""The source of every rule here; part of every `Score`, to be named with its value."""


@dataclass(frozen=True)
class Row:
    """One question of a benchmark's TSV file with a model's answer.

    Attributes:
        index: the row's `index`, as text. HallusionBench's contains the ids of set, figure and question.
        prediction: the model's answer as generated; each rule strips and folds it as needed.
        answers: the references. Ten for TextVQA, one for ChartQA, MME, MMStar (a letter) and HallusionBench; none where
            the makers withhold them.
        category: OCRBench, MME, MMStar, HallusionBench.
        l2_category: MMStar, HallusionBench.
        split: ChartQA, `test_human` or `test_augmented`.
        image: MME's `image_path`, which the two questions of a pair share.
        options: MMStar, text per letter, without letters that have no text.
    """

    index: str
    prediction: str
    answers: tuple[str, ...]
    category: str | None = None
    l2_category: str | None = None
    split: str | None = None
    image: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """`scale` times a quotient of two sums over groups of rows. Every score here is a sum of ratios.

    A mean is one ratio, MME's score the sum of 28. The sums are kept per group so that a bootstrap can weigh groups.
    """

    scale: float
    numerators: Mapping[str, float]
    denominators: Mapping[str, float]

    @property
    def value(self) -> float:
        """The ratio, of exactly rounded sums: the order of the rows cannot change a score."""
        return self.scale * math.fsum(self.numerators.values()) / math.fsum(self.denominators.values())


def mean_ratio(scale: float, groups: Iterable[str], outcomes: Iterable[float]) -> Ratio:
    """`scale` times the mean of the outcomes; `groups` names the group of each outcome."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for group, outcome in zip(groups, outcomes, strict=True):
        sums[group] += outcome
        counts[group] += 1
    return Ratio(scale, dict(sums), dict(counts))


def outcomes_by(labels: Sequence[str | None], outcomes: Sequence[float]) -> dict[str, list[float]]:
    """The outcomes per label, labels sorted; rows without a label are left out."""
    by_label: dict[str, list[float]] = defaultdict(list)
    for label, outcome in zip(labels, outcomes, strict=True):
        if label is not None:
            by_label[label].append(outcome)
    return {label: by_label[label] for label in sorted(by_label)}


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
        harness: the source of the rules.
    """

    dataset: str
    value: float
    unit: str
    per_sample: tuple[float, ...]
    harness: str = HARNESS
