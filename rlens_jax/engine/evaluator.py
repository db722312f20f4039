"""Evaluates plans: work items (plan, batch) on the devices, with every finished evaluation in the journal.

Base states are kept for as many batches as the memory budget allows: for a whole split if they fit, else for one part of its
batches at a time. All candidates of a round are evaluated on a part before the states of the next one are made.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlens_jax.engine.batches import FILLER
from rlens_jax.engine.inputs import Batch, Split
from rlens_jax.engine.schedule import Step, memory_parts, schedule
from rlens_jax.engine.scoring import Scoring
from rlens_jax.errors import UserError
from rlens_jax.plan import Plan
from rlens_jax.search.journal import Journal
from rlens_jax.search.objective import PlanScore, dataset_metrics, score_plan
from rlens_jax.search.record import Record
from rlens_jax.search.search import ScoreRound

Outcomes = dict[str, np.ndarray]
"""The metric of each sample by dataset, float64 [samples]."""


@runtime_checkable
class Advance(Protocol):
    """Shows that a plan is evaluated on one more dataset; such as `Progress.advance`."""

    def __call__(self, *, anew: bool) -> None:
        """`anew`: the evaluation was made now, not by an earlier run."""


def unseen(*, anew: bool) -> None:
    """Show no progress."""


class Evaluator:
    """Outcomes of plans on the samples of each split.

    Args:
        scoring: how a batch is evaluated under plans.
        splits: samples and batches by the name of the split.
        journal: keeps finished evaluations, which are not made again.
        state_bytes: memory for base states on a device.
        checkpoint: called after each plan whose outcomes are in the journal, at the same points on all processes; may
            raise to end the run.
    """

    def __init__(
        self,
        scoring: Scoring,
        splits: Mapping[str, Split],
        journal: Journal,
        *,
        state_bytes: float,
        checkpoint: Callable[[], None] = lambda: None,
    ):
        self._scoring = scoring
        self.splits = splits
        self._journal = journal
        self._state_bytes = state_bytes
        self._checkpoint = checkpoint

    def outcomes(self, split: str, base: Plan, plans: Sequence[Plan], advance: Advance = unseen) -> list[Outcomes]:
        """Each plan's outcomes on all datasets of a split.

        Args:
            split: the name of the split.
            base: the plan whose states the others start from; a nearer plan saves more layers.
            plans: the plans to evaluate; one may equal `base`.
            advance: shows progress.

        Raises:
            UserError: a probe score was not a number, naming plan and sample.
        """
        datasets, todo = self.splits[split].datasets, []
        for plan in dict.fromkeys(plans):
            known = [self._journal.get(split, plan, name) is not None for name in datasets]
            for _ in filter(None, known):
                advance(anew=False)
            if not all(known):
                todo.append(plan)
        if todo:
            self._evaluate(split, base, todo, advance)
        return [self._recorded(split, plan) for plan in plans]

    def _recorded(self, split: str, plan: Plan) -> Outcomes:
        outcomes = {}
        for name in self.splits[split].datasets:
            record = self._journal.get(split, plan, name)
            assert record is not None
            outcomes[name] = np.array(record.outcomes)
        return outcomes

    def _evaluate(self, split: str, base: Plan, plans: Sequence[Plan], advance: Advance) -> None:
        batches = self.splits[split].batches
        parts = memory_parts([self._scoring.state_bytes(batch) for batch in batches], self._state_bytes)
        costs = [self._scoring.cost(base, plan) for plan in plans]
        results = [np.zeros(len(self.splits[split].samples)) for _ in plans]
        began = time.monotonic()
        for part in parts:
            if len(parts) > 1:
                self._scoring.release()
            members = [batches[number] for number in part]
            steps = schedule([batch.filled for batch in members], costs)
            last_step = {item.plan: i for i, step in enumerate(steps) for item in step.items if item}
            for i, run in self._running(members, base, plans, steps):
                self._enter(results, split, plans, steps[i], run)
                for plan in (plan for plan, last in last_step.items() if last == i):
                    if part is parts[-1]:
                        seconds, began = time.monotonic() - began, time.monotonic()
                        self._record(split, plans[plan], results[plan], seconds, advance)
                        self._checkpoint()

    def _running(
        self, batches: Sequence[Batch], base: Plan, plans: Sequence[Plan], steps: Sequence[Step]
    ) -> Iterator[tuple[int, Any]]:
        """The started steps in order; the devices get the steps of one plan before any result is read."""
        running: deque[tuple[int, Any]] = deque()
        for i, step in enumerate(steps):
            # A group without an item repeats another's work, and its rows are not read.
            spare = next(item for item in step.items if item is not None)
            items = [item or spare for item in step.items]
            chosen, blocks = [plans[item.plan] for item in items], [item.block for item in items]
            running.append((i, self._scoring.start(batches[step.batch], base, chosen, blocks)))
            if len(running) > len(batches):
                yield running.popleft()
        yield from running

    def _enter(self, results: Sequence[np.ndarray], split: str, plans: Sequence[Plan], step: Step, run: Any) -> None:
        """Enter a step's rows into the results; a sample is right if any reference answer is reproduced."""
        samples = self.splits[split].samples
        rows = self._scoring.finish(run, samples)
        block = len(rows.sample) // len(step.items)
        for group, item in enumerate(step.items):
            for row in range(group * block, (group + 1) * block):
                number = rows.sample[row]
                if item is None or number == FILLER:
                    continue
                if not rows.scored[row]:
                    raise UserError(
                        f"{samples[number].id}: probe scores are not numbers under the plan "
                        f"{plans[item.plan].label()}; check the weights, or compute in float32"
                    )
                results[item.plan][number] = max(results[item.plan][number], float(rows.right[row]))

    def _record(self, split: str, plan: Plan, result: np.ndarray, seconds: float, advance: Advance) -> None:
        """Write a plan's outcomes to the journal; its datasets share the seconds in proportion to their samples."""
        for name, members in self.splits[split].datasets.items():
            if self._journal.get(split, plan, name) is None:
                share = seconds * len(members) / len(result)
                self._journal.append(Record(split, plan, name, tuple(result[members].tolist()), share))
                advance(anew=True)


def round_scorer(
    evaluator: Evaluator,
    split: str,
    dense: Mapping[str, float],
    advance: Advance = unseen,
    *,
    alpha: float,
    relative: bool,
) -> ScoreRound:
    """The scores that `rank_layers` asks for, on a split with the dense metrics `dense`; see `score_plan`."""

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        outcomes = evaluator.outcomes(split, base, candidates, advance)
        return [score_plan(dataset_metrics(each), dense, alpha=alpha, relative=relative) for each in outcomes]

    return score_round
