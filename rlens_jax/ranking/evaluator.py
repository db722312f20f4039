"""Evaluates plans: work items (plan, batch) on the device, with every finished evaluation in the journal.

Base states are kept for as many batches as the memory budget allows: all of a split's if they fit, else one group of batches
at a time (all candidates of a round are then evaluated on a group before the next one's states are made).
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.plan import Plan
from rlens_jax.ranking.inputs import Batch, Dataset
from rlens_jax.ranking.journal import Journal, Record
from rlens_jax.ranking.scoring import Scoring

Outcomes = dict[str, np.ndarray]
"""Per dataset the metric of each sample, float64 [samples]."""


class Evaluator:
    """Outcomes of plans on the datasets of each split.

    Args:
        scoring: how a batch is evaluated under a plan.
        splits: the datasets of each split.
        journal: where finished evaluations are kept; what it has is not evaluated again.
        state_bytes: memory for base states.
        advance: called after each (plan, dataset) evaluation; with False for one that the journal already had.
    """

    def __init__(
        self,
        scoring: Scoring,
        splits: Mapping[str, Sequence[Dataset]],
        journal: Journal,
        *,
        state_bytes: float,
        advance: Callable[[bool], None],
    ):
        self._scoring = scoring
        self._splits = splits
        self._journal = journal
        self._state_bytes = state_bytes
        self._advance = advance

    def outcomes(self, split: str, base: Plan, plans: Sequence[Plan]) -> list[Outcomes]:
        """Each plan's outcomes on all datasets of a split.

        Args:
            split: which datasets.
            base: the plan whose states the others start from; the nearer, the less is computed.
            plans: the plans to evaluate; one may equal `base`.

        Raises:
            UserError: a probe score was not a number, naming plan and sample.
        """
        for dataset in self._splits[split]:
            todo = []
            for plan in dict.fromkeys(plans):
                if self._journal.get(split, plan, dataset.name) is None:
                    todo.append(plan)
                else:
                    self._advance(False)
            if todo:
                self._evaluate(split, dataset, base, todo)
        return [self._journalled(split, plan) for plan in plans]

    def _journalled(self, split: str, plan: Plan) -> Outcomes:
        outcomes = {}
        for dataset in self._splits[split]:
            record = self._journal.get(split, plan, dataset.name)
            assert record is not None
            outcomes[dataset.name] = np.array(record.outcomes)
        return outcomes

    def _evaluate(self, split: str, dataset: Dataset, base: Plan, plans: Sequence[Plan]) -> None:
        groups = self._groups(split, dataset)
        results = {plan: np.zeros(len(dataset.samples)) for plan in plans}
        seconds = dict.fromkeys(plans, 0.0)
        for number, group in enumerate(groups):
            if len(groups) > 1:
                self._scoring.release()
            for plan in plans:
                began = time.monotonic()
                # All batches are handed to the device before the first result is read.
                running = [self._scoring.start(batch, base, plan) for batch in group]
                for batch, run in zip(group, running, strict=True):
                    right, scored = self._scoring.finish(run, dataset, batch)
                    _enter(results[plan], right, scored, dataset, batch, plan)
                seconds[plan] += time.monotonic() - began
                if number == len(groups) - 1:
                    outcomes = tuple(results[plan].tolist())
                    self._journal.append(Record(split, plan, dataset.name, outcomes, seconds[plan]))
                    self._advance(True)

    def _groups(self, split: str, dataset: Dataset) -> list[Sequence[Batch]]:
        """The dataset's batches, cut so that the base states of a group fit into memory."""
        if (
            sum(self._scoring.state_bytes(b) for d in self._splits[split] for b in d.batches)
            <= self._state_bytes
        ):
            return [dataset.batches]
        largest = max(self._scoring.state_bytes(batch) for batch in dataset.batches)
        size = max(1, int(self._state_bytes // largest))
        return [dataset.batches[i : i + size] for i in range(0, len(dataset.batches), size)]


def _enter(
    results: np.ndarray, right: np.ndarray, scored: np.ndarray, dataset: Dataset, batch: Batch, plan: Plan
) -> None:
    """Enter a batch's rows into the dataset's outcomes; any reference answer that is reproduced makes a sample right."""
    for row, sample in enumerate(batch.samples):
        if not scored[row]:
            raise UserError(
                f"{dataset.samples[sample].id}: probe scores are not numbers under the plan {plan.label()}; "
                "check the weights, or compute in float32"
            )
        results[sample] = max(results[sample], float(right[row]))
