"""The scorers of the eight benchmarks, by VLMEvalKit's dataset names."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.choice_metrics import choice_accuracy, hallusion_bench, mme, yes_no_accuracy
from rlens_jax.metrics.score import Aggregate, Row, Score, mean_ratio, outcomes_by
from rlens_jax.metrics.text_metrics import anls, contains_answer, ocrbench, relaxed_accuracy, vqa_accuracy


def mean_accuracy(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """100 times the mean over the rows (not over categories), and the same per split and category. Each question is a group."""
    names = tuple(row.index for row in rows)
    breakdown = {}
    for field in ("split", "category", "l2_category"):
        for label, outcomes in outcomes_by([getattr(row, field) for row in rows], per_sample).items():
            breakdown[f"{field}/{label}"] = 100 * math.fsum(outcomes) / len(outcomes)
    return Aggregate((mean_ratio(100, names, per_sample),), breakdown, names, ("",) * len(rows))


@dataclass(frozen=True)
class Scorer:
    """How a dataset is scored.

    Attributes:
        sample: the score in [0, 1] of a row, which must have an answer.
        aggregate: the dataset's score, from its rows and their scores.
        unit: unit of the dataset's score.
        withheld: whether only the benchmark's server has the answers.
    """

    sample: Callable[[Row], float]
    aggregate: Callable[[Sequence[Row], Sequence[float]], Aggregate] = mean_accuracy
    unit: str = "%"
    withheld: bool = False


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "OCRBench": Scorer(contains_answer, ocrbench, "of 1000"),
        "DocVQA_VAL": Scorer(anls),
        "DocVQA_TEST": Scorer(anls, withheld=True),
        "InfoVQA_VAL": Scorer(anls),
        "InfoVQA_TEST": Scorer(anls, withheld=True),
        "ChartQA_TEST": Scorer(relaxed_accuracy),
        "TextVQA_VAL": Scorer(vqa_accuracy),
        "MME": Scorer(yes_no_accuracy, mme, "of 2800"),
        "MMStar": Scorer(choice_accuracy),
        "HallusionBench": Scorer(yes_no_accuracy, hallusion_bench),
    }
)
"""By dataset. Those who have the withheld answers can score these datasets, too."""


def score(dataset: str, rows: Sequence[Row], unanswered: Collection[str] = ()) -> Score:
    """Score all or some of a dataset's rows; those with an index in `unanswered` are wrong, whatever their prediction.

    Raises:
        UserError: the dataset is unknown, there are no rows, an index occurs twice, a row has no answers, or the
            dataset's scorer refuses a row.
    """
    if dataset not in SCORERS:
        raise UserError(f"unknown dataset {dataset!r}{suggest(dataset, SCORERS)}; known: {', '.join(SCORERS)}")
    if not rows:
        raise UserError(f"{dataset}: no rows to score")
    (index, times), *_ = Counter(row.index for row in rows).most_common(1)
    if times > 1:
        raise UserError(f"{dataset}: index {index} occurs {times} times; each question must have one row")
    scorer = SCORERS[dataset]
    for row in rows:
        if not row.answers:
            remedy = (
                "only the benchmark's server has the answers of this split: submit the predictions there, or score "
                f"{dataset.replace('TEST', 'VAL')}"
                if scorer.withheld
                else "complete the row"
            )
            raise UserError(f"{dataset}: row {row.index} has no answers; {remedy}")
    try:
        per_sample = tuple(scorer.sample(row) * (row.index not in unanswered) for row in rows)
        aggregate = scorer.aggregate(rows, per_sample)
    except UserError as error:
        raise UserError(f"{dataset}: {error}") from None
    return Score(
        dataset=dataset,
        value=math.fsum(ratio.value for ratio in aggregate.ratios),
        unit=scorer.unit,
        per_sample=per_sample,
        **vars(aggregate),
    )
