"""Evaluates plans: work items (plan, batch) on the devices, with every finished evaluation in the journal.

Base states are kept for as many batches as the memory budget allows: all of a split's if they fit, else one group of batches
at a time (all candidates of a round are then evaluated on a group before the next one's states are made).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlens_jax.engine.inputs import FILLER, Batch, Split
from rlens_jax.engine.schedule import Step, schedule
from rlens_jax.engine.scoring import Scoring
from rlens_jax.errors import UserError
from rlens_jax.plan import Plan
from rlens_jax.search.journal import Journal, Record

Outcomes = dict[str, np.ndarray]
"""Per dataset the metric of each sample, float64 [samples]."""


class Evaluator:
    """Outcomes of plans on the samples of each split.

    Args:
        scoring: how a batch is evaluated under plans.
        splits: their samples and batches.
        journal: where finished evaluations are kept; what it has is not evaluated again.
        num_layers: of the decoder, L.
        state_bytes: memory for base states on a device.
        advance: called after each (plan, dataset) evaluation; with False for one that the journal already had.
    """

    def __init__(
        self,
        scoring: Scoring,
        splits: Mapping[str, Split],
        journal: Journal,
        *,
        num_layers: int,
        state_bytes: float,
        advance: Callable[[bool], None],
    ):
        self._scoring = scoring
        self._splits = splits
        self._journal = journal
        self._num_layers = num_layers
        self._state_bytes = state_bytes
        self._advance = advance

    def outcomes(self, split: str, base: Plan, plans: Sequence[Plan]) -> list[Outcomes]:
        """Each plan's outcomes on all datasets of a split.

        Args:
            split: which samples.
            base: the plan whose states the others start from; the nearer, the less is computed.
            plans: the plans to evaluate; one may equal `base`.

        Raises:
            UserError: a probe score was not a number, naming plan and sample.
        """
        datasets, todo = self._splits[split].datasets, []
        for plan in dict.fromkeys(plans):
            known = [self._journal.get(split, plan, name) is not None for name in datasets]
            for _ in filter(None, known):
                self._advance(False)
            if not all(known):
                todo.append(plan)
        if todo:
            self._evaluate(split, base, todo)
        return [self._journalled(split, plan) for plan in plans]

    def _journalled(self, split: str, plan: Plan) -> Outcomes:
        outcomes = {}
        for name in self._splits[split].datasets:
            record = self._journal.get(split, plan, name)
            assert record is not None
            outcomes[name] = np.array(record.outcomes)
        return outcomes

    def _evaluate(self, split: str, base: Plan, plans: Sequence[Plan]) -> None:
        parts = self._parts(split)
        costs = [self._num_layers - self._scoring.first_layer(base, plan) for plan in plans]
        results = [np.zeros(len(self._splits[split].samples)) for _ in plans]
        began = time.monotonic()
        for number, batches in enumerate(parts):
            if len(parts) > 1:
                self._scoring.release()
            steps = schedule([batch.filled for batch in batches], costs)
            last_step = {item.plan: i for i, step in enumerate(steps) for item in step.items if item}
            for i, run in self._running(batches, base, plans, steps):
                self._enter(results, split, plans, steps[i], run)
                for plan in (plan for plan, last in last_step.items() if last == i):
                    if number == len(parts) - 1:
                        seconds, began = time.monotonic() - began, time.monotonic()
                        self._finish(split, plans[plan], results[plan], seconds)

    def _running(
        self, batches: Sequence[Batch], base: Plan, plans: Sequence[Plan], steps: Sequence[Step]
    ) -> Iterator[tuple[int, Any]]:
        """The steps' runs, in order; the devices are given the steps of one plan ahead of what is read back."""
        ahead = len(batches)
        running: deque[tuple[int, Any]] = deque()
        for i, step in enumerate(steps):
            # A group without an item repeats another's work, and its rows are not read.
            spare = next(item for item in step.items if item is not None)
            items = [item or spare for item in step.items]
            chosen, blocks = [plans[item.plan] for item in items], [item.block for item in items]
            running.append((i, self._scoring.start(batches[step.batch], base, chosen, blocks)))
            if len(running) > ahead:
                yield running.popleft()
        yield from running

    def _enter(self, results: Sequence[np.ndarray], split: str, plans: Sequence[Plan], step: Step, run: Any) -> None:
        """Enter a step's rows into the results; any reference answer that is reproduced makes a sample right."""
        samples = self._splits[split].samples
        numbers, right, scored = self._scoring.finish(run, samples)
        block = len(numbers) // len(step.items)
        for group, item in enumerate(step.items):
            for row in range(group * block, (group + 1) * block):
                if item is None or numbers[row] == FILLER:
                    continue
                if not scored[row]:
                    raise UserError(
                        f"{samples[numbers[row]].id}: probe scores are not numbers under the plan "
                        f"{plans[item.plan].label()}; check the weights, or compute in float32"
                    )
                result = results[item.plan]
                result[numbers[row]] = max(result[numbers[row]], float(right[row]))

    def _finish(self, split: str, plan: Plan, result: np.ndarray, seconds: float) -> None:
        """Write a plan's outcomes; the seconds are shared by its datasets in proportion to their samples."""
        for name, members in self._splits[split].datasets.items():
            if self._journal.get(split, plan, name) is None:
                share = seconds * len(members) / len(result)
                self._journal.append(Record(split, plan, name, tuple(result[members].tolist()), share))
                self._advance(True)

    def _parts(self, split: str) -> list[Sequence[Batch]]:
        """The split's batches, cut so that the base states of a part fit into memory."""
        batches = self._splits[split].batches
        sizes = [self._scoring.state_bytes(batch) for batch in batches]
        if sum(sizes) <= self._state_bytes:
            return [batches]
        size = max(1, int(self._state_bytes // max(sizes)))
        return [batches[i : i + size] for i in range(0, len(batches), size)]
