"""The scorers of the eight benchmarks, by VLMEvalKit's dataset names."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.anls import anls
from rlens_jax.metrics.containment import contains_answer, ocrbench
from rlens_jax.metrics.hallusion_bench import hallusion_bench
from rlens_jax.metrics.mme import mme
from rlens_jax.metrics.multiple_choice import choice_accuracy
from rlens_jax.metrics.relaxed import relaxed_accuracy
from rlens_jax.metrics.score import Aggregate, Row, Score, mean_ratio, outcomes_by
from rlens_jax.metrics.vqa_accuracy import vqa_accuracy
from rlens_jax.metrics.yes_no import yes_no_accuracy

_BREAKDOWN_FIELDS = ("split", "category", "l2_category")
_SERVER_ONLY = ("DocVQA_TEST", "InfoVQA_TEST")


def mean_accuracy(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """100 times the mean over the rows (not over categories), and the same within each split and category.

    A group is a question.
    """
    names = tuple(row.index for row in rows)
    breakdown = {}
    for field in _BREAKDOWN_FIELDS:
        for label, outcomes in outcomes_by([getattr(row, field) for row in rows], per_sample).items():
            breakdown[f"{field}/{label}"] = 100 * math.fsum(outcomes) / len(outcomes)
    return Aggregate((mean_ratio(100, names, per_sample),), breakdown, names, ("",) * len(rows))


@dataclass(frozen=True)
class Scorer:
    """How a dataset is scored.

    Attributes:
      sample: the score in [0, 1] of a row, which must have an answer.
      aggregate: the dataset's score, from its rows and their scores.
      unit: of the dataset's score.
    """

    sample: Callable[[Row], float]
    aggregate: Callable[[Sequence[Row], Sequence[float]], Aggregate] = mean_accuracy
    unit: str = "%"


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "OCRBench": Scorer(contains_answer, ocrbench, "of 1000"),
        "DocVQA_VAL": Scorer(anls),
        "DocVQA_TEST": Scorer(anls),
        "InfoVQA_VAL": Scorer(anls),
        "InfoVQA_TEST": Scorer(anls),
        "ChartQA_TEST": Scorer(relaxed_accuracy),
        "TextVQA_VAL": Scorer(vqa_accuracy),
        "MME": Scorer(yes_no_accuracy, mme, "of 2800"),
        "MMStar": Scorer(choice_accuracy),
        "HallusionBench": Scorer(yes_no_accuracy, hallusion_bench),
    }
)
"""By dataset. `*_TEST` of DocVQA and InfoVQA can be scored by who has the answers, which are not published."""


def score(dataset: str, rows: Sequence[Row]) -> Score:
    """The score of a dataset's rows, all of them or a part.

    Raises:
      UserError: an unknown dataset, no rows, an index twice, a row without answers, or what the dataset's
        scorer says.
    """
    if dataset not in SCORERS:
        raise UserError(f"unknown dataset {dataset!r}{suggest(dataset, SCORERS)}; known: {', '.join(SCORERS)}")
    if not rows:
        raise UserError(f"{dataset}: no rows to score")
    (index, times), *_ = Counter(row.index for row in rows).most_common(1)
    if times > 1:
        raise UserError(f"{dataset}: index {index} occurs {times} times; one row a question")
    for row in rows:
        if not row.answers:
            raise UserError(
                f"{dataset}: row {row.index} has no answers; "
                + (
                    "those of this split are on the benchmark's server only: submit the predictions there, or "
                    f"score {dataset.replace('TEST', 'VAL')}"
                    if dataset in _SERVER_ONLY
                    else "complete the row"
                )
            )
    scorer = SCORERS[dataset]
    per_sample = tuple(scorer.sample(row) for row in rows)
    aggregate = scorer.aggregate(rows, per_sample)
    return Score(
        dataset=dataset,
        value=math.fsum(ratio.value for ratio in aggregate.ratios),
        unit=scorer.unit,
        per_sample=per_sample,
        **vars(aggregate),
    )
