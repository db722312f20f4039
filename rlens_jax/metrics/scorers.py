"""The scorers of the benchmarks, by VLMEvalKit's dataset names."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.choice_metrics import (
    choice_accuracy,
    circular,
    hallusion_bench,
    mme,
    mmmu,
    open_choice_accuracy,
    pope,
    yes_no_accuracy,
)
from rlens_jax.metrics.score import CURRENT, RULES, Aggregate, Row, Score, mean_ratio, means_by_column
from rlens_jax.metrics.text_metrics import anls, contains_answer, exact_accuracy, ocrbench, relaxed_accuracy, vqa_accuracy


def mean_accuracy(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """100 times the mean over the rows (not over categories), and the same per split and category. Each question is a group."""
    names = tuple(row.index for row in rows)
    return Aggregate((mean_ratio(100, names, per_sample),), means_by_column(rows, per_sample), names, ("",) * len(rows))


@dataclass(frozen=True)
class Scorer:
    """How a dataset is scored.

    Attributes:
        sample: the score in [0, 1] of a row, which must have an answer.
        aggregate: the dataset's score, from its rows and their scores.
        unit: unit of the dataset's score.
        withheld: whether only the benchmark's server has the answers.
        dated: whether `sample` takes the `Rules` of a time.
    """

    sample: Callable[..., float]
    aggregate: Callable[[Sequence[Row], Sequence[float]], Aggregate] = mean_accuracy
    unit: str = "%"
    withheld: bool = False
    dated: bool = False


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "OCRBench": Scorer(contains_answer, ocrbench, "of 1000"),
        "DocVQA_VAL": Scorer(anls),
        "DocVQA_TEST": Scorer(anls, withheld=True),
        "InfoVQA_VAL": Scorer(anls),
        "InfoVQA_TEST": Scorer(anls, withheld=True),
        "ChartQA_TEST": Scorer(relaxed_accuracy, dated=True),
        "TextVQA_VAL": Scorer(vqa_accuracy),
        "MME": Scorer(yes_no_accuracy, mme, "of 2800"),
        "MMStar": Scorer(choice_accuracy, dated=True),
        "HallusionBench": Scorer(yes_no_accuracy, hallusion_bench),
        "POPE": Scorer(yes_no_accuracy, pope),
        "GQA_TestDev_Balanced": Scorer(exact_accuracy),
        "MMBench_DEV_EN": Scorer(choice_accuracy, circular, dated=True),
        "MMBench_DEV_EN_V11": Scorer(choice_accuracy, circular, dated=True),
        "MMBench_TEST_EN_V11": Scorer(choice_accuracy, circular, dated=True),
        "ScienceQA_VAL": Scorer(choice_accuracy, dated=True),
        "ScienceQA_TEST": Scorer(choice_accuracy, dated=True),
        "VizWiz": Scorer(vqa_accuracy),
        "SEEDBench_IMG": Scorer(choice_accuracy, dated=True),
        "MMMU_DEV_VAL": Scorer(open_choice_accuracy, mmmu, dated=True),
        "AI2D_TEST": Scorer(choice_accuracy, dated=True),
        "AI2D_TEST_NO_MASK": Scorer(choice_accuracy, dated=True),
        "RealWorldQA": Scorer(choice_accuracy, dated=True),
    }
)
"""By dataset. Those who have the withheld answers can score these datasets, too."""


def score(dataset: str, rows: Sequence[Row], unanswered: Collection[str] = (), rules: str = CURRENT) -> Score:
    """Score all or some of a dataset's rows; those with an index in `unanswered` are wrong, whatever their prediction.

    `rules` is a key of `RULES`.

    Raises:
        UserError: the dataset or the rules are unknown, there are no rows, an index occurs twice, a row has no answers, or the
            dataset's scorer refuses a row.
    """
    if dataset not in SCORERS:
        raise UserError(f"unknown dataset {dataset!r}{suggest(dataset, SCORERS)}; known: {', '.join(SCORERS)}")
    if rules not in RULES:
        raise UserError(f"unknown rules {rules!r}{suggest(rules, RULES)}; known: {', '.join(RULES)}")
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
    rows = [replace(row, prediction="") if row.index in unanswered else row for row in rows]
    sample = partial(scorer.sample, rules=RULES[rules]) if scorer.dated else scorer.sample
    try:
        per_sample = tuple(sample(row) * (row.index not in unanswered) for row in rows)
        aggregate = scorer.aggregate(rows, per_sample)
    except UserError as error:
        raise UserError(f"{dataset}: {error}") from None
    return Score(
        dataset=dataset,
        value=math.fsum(ratio.value for ratio in aggregate.ratios),
        unit=scorer.unit,
        per_sample=per_sample,
        harness=RULES[rules].harness,
        **vars(aggregate),
    )
