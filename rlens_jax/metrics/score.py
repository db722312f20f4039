"""What a scorer reads and what it says."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

HARNESS = "VLMEvalKit rules, open-compass/VLMEvalKit @ e8e78f05"
"""Whose rules every number here follows; part of every `Score`, to be stated beside its value."""


@dataclass(frozen=True)
class Row:
    """One question of a benchmark's TSV file, with what a model said.

    Attributes:
      index: the row's `index`, as text. HallusionBench's holds the ids of set, figure and question.
      prediction: the model's answer as generated; each rule strips and folds what it has to.
      answers: the references. Ten for TextVQA, one for ChartQA, MME, MMStar (a letter) and HallusionBench;
        none where the server keeps them.
      category: OCRBench, MME, MMStar, HallusionBench.
      l2_category: MMStar, HallusionBench.
      split: ChartQA, `test_human` or `test_augmented`.
      image: MME's `image_path`: the two questions of a pair share it.
      options: MMStar, the text of each letter; a letter without text is left out.
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
    """`scale` times a quotient of two sums over groups of rows, the form that every aggregate here is made of.

    A mean is one ratio, MME's score the sum of 28. Kept by group, so that a bootstrap can weigh the groups.
    """

    scale: float
    numerators: Mapping[str, float]
    denominators: Mapping[str, float]

    @property
    def value(self) -> float:
        """With exactly rounded sums: the order of the rows cannot change a score."""
        return self.scale * math.fsum(self.numerators.values()) / math.fsum(self.denominators.values())


def mean_ratio(scale: float, groups: Iterable[str], outcomes: Iterable[float]) -> Ratio:
    """`scale` times the mean of the outcomes, each of which belongs to the group beside it."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for group, outcome in zip(groups, outcomes, strict=True):
        sums[group] += outcome
        counts[group] += 1
    return Ratio(scale, dict(sums), dict(counts))


def outcomes_by(labels: Sequence[str | None], outcomes: Sequence[float]) -> dict[str, list[float]]:
    """The outcomes under each label, labels sorted; rows without a label are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for label, outcome in zip(labels, outcomes, strict=True):
        if label is not None:
            found[label].append(outcome)
    return {label: found[label] for label in sorted(found)}


@dataclass(frozen=True)
class Aggregate:
    """What the rows of a dataset come to.

    Attributes:
      ratios: their values add up to the dataset's score.
      breakdown: parts of the score by name: "perception", "category/color/acc+", "split/test_human", ...
      groups: each row's group, which a bootstrap draws or leaves as a whole.
      strata: each row's stratum: draws keep the number of groups of each.
    """

    ratios: tuple[Ratio, ...]
    breakdown: Mapping[str, float]
    groups: tuple[str, ...]
    strata: tuple[str, ...]


@dataclass(frozen=True)
class Score(Aggregate):
    """A dataset's score, and what it is made of.

    Attributes:
      dataset: VLMEvalKit's name of it.
      value: on the scale that is published, in `unit`.
      unit: "%", "of 1000" (OCRBench) or "of 2800" (MME).
      per_sample: each row's own score in [0, 1], in the order of the rows.
      harness: whose rules these are.
    """

    dataset: str
    value: float
    unit: str
    per_sample: tuple[float, ...]
    harness: str = HARNESS
