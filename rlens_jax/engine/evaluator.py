"""Evaluates plans batch by batch; the outcomes of every finished batch are in the journal.

Base states are kept for all batches of a split if they fit into the memory budget, else for one part of them at a time. All plans
are evaluated on a part before the states of the next one are made.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rlens_jax.console import Progress
from rlens_jax.engine.inputs import Split
from rlens_jax.engine.overflow import not_finite
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.schedule import memory_parts
from rlens_jax.engine.scoring import Scoring
from rlens_jax.models.prompt import FILLER
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Journal, Record
from rlens_jax.search.race import IN_PROGRESS, Difficulty

Outcomes = dict[str, np.ndarray]
"""The metric of each sample by dataset, float64 [samples]."""


class Tally:
    """Which samples of a split are finished under a plan: those all of whose branches were evaluated."""

    def __init__(self, num_branches: np.ndarray):
        self._missing = num_branches.copy()
        self._best = np.full(len(num_branches), -np.inf)

    def enter(self, numbers: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Enter branches, by their samples; the reference answer with the best outcome counts.

        Returns the numbers of the samples that are finished now, ascending, and their outcomes.
        """
        np.subtract.at(self._missing, numbers, 1)
        np.maximum.at(self._best, numbers, outcomes)
        finished = np.unique(numbers)
        finished = finished[self._missing[finished] == 0]
        return finished, self._best[finished]


class Step(NamedTuple):
    """A plan on a batch, started from the states of `base`."""

    split: str
    plan: Plan
    base: Plan
    batch: Batch
    tally: Tally
    run: Any = None
    """Input of `Scoring.finish`; None if all outcomes are in the journal."""


@dataclass(frozen=True)
class Evaluator:
    """Outcomes of plans on the samples of each split.

    Attributes:
        scoring: evaluates a batch under a plan.
        splits: samples and rows, by the name of the split.
        journal: keeps finished evaluations, which are not made again.
        state_bytes: memory for base states on a device.
        checkpoint: called after each step whose outcomes are in the journal, at the same points on all processes; may raise to
            end the run.
    """

    scoring: Scoring
    splits: Mapping[str, Split]
    journal: Journal
    state_bytes: float
    checkpoint: Callable[[], None] = lambda: None
    difficulties: dict[str, Difficulty] = field(default_factory=dict)
    """By the name of the split; from finished rounds alone, so that a resumed run has the same."""

    def outcomes(self, split: str, base: Plan, plans: Sequence[Plan], progress: Progress | None = None) -> list[Outcomes]:
        """Each plan's outcomes on all datasets of a split.

        Args:
            base: the plan whose states the others start from; a nearer plan saves more layers.
            plans: the plans to evaluate; one may equal `base`.
            progress: counts the plans.

        Raises:
            UserError: numbers are not finite, naming plan, sample and layer.
        """
        return self._evaluate(split, dict.fromkeys(plans, base), plans, progress)

    def chain(self, split: str, plans: Sequence[Plan], progress: Progress | None = None) -> list[Outcomes]:
        """As `outcomes`, but each plan starts from the states of the one before it, in the first layer in which they differ."""
        return self._evaluate(split, {plan: plan for plan in plans}, plans, progress)

    def _evaluate(
        self, split: str, bases: Mapping[Plan, Plan], plans: Sequence[Plan], progress: Progress | None
    ) -> list[Outcomes]:
        todo = {plan: Tally(self.splits[split].num_branches) for plan in bases if not self.known(split, plan).all()}
        if progress is not None:
            progress.advance(len(bases) - len(todo), resumed=True)
        for part in self.parts(self.splits[split].batches) if todo else ():
            self.scoring.hold(part)
            steps = (Step(split, plan, bases[plan], batch, tally) for plan, tally in todo.items() for batch in part)
            for step in self._finished(steps):
                if progress is not None and self.known(split, step.plan).all():
                    progress.advance()
        datasets, count = self.splits[split].datasets, len(self.splits[split].samples)
        outcomes = [self.journal.outcomes(split, plan, count) for plan in plans]
        return [{name: values[members] for name, members in datasets.items()} for values in outcomes]

    def _finished(self, steps: Iterable[Step]) -> Iterable[Step]:
        """The steps that were not in the journal, when they are."""
        running: deque[Step] = deque()
        for step in steps:
            running.append(self.start(step))
            if len(running) == IN_PROGRESS:
                self.finish(running[0])
                yield running.popleft()
        while running:
            self.finish(running[0])
            yield running.popleft()

    def parts(self, batches: Sequence[Batch]) -> list[Sequence[Batch]]:
        """Batches whose base states are kept at the same time."""
        sizes = [self.scoring.state_bytes(batch.pool) * batch.pool.block_rows for batch in batches]
        return [batches[part.start : part.stop] for part in memory_parts(sizes, self.state_bytes)]

    def start(self, step: Step) -> Step:
        """Start a step on the devices, unless the journal has its outcomes."""
        if self.known(step.split, step.plan)[step.batch.members].all():
            return step
        return step._replace(run=self.scoring.start(step.batch, step.base, step.plan))

    def finish(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Wait for a step, and write its outcomes to the journal: the samples that are finished now, and their outcomes.

        Steps are finished in the order in which they were started.
        """
        split, began = self.splits[step.split], time.monotonic()
        if step.run is None:
            numbers = step.batch.samples[step.batch.samples != FILLER]
            finished, _ = step.tally.enter(numbers, np.zeros(len(numbers)))
        else:
            rows = self.scoring.finish(step.run, split.samples)
            numbers, outcomes, finite = (part[rows.sample != FILLER] for part in rows)
            for number in numbers[~finite].tolist():
                programs = self.scoring.programs
                raise not_finite(programs, step.batch, number, split.samples[number].id, step.plan, programs.reduction)
            finished, values = step.tally.enter(numbers, outcomes)
            new = ~self.known(step.split, step.plan)[finished]
            if new.any():
                seconds = time.monotonic() - began
                self.journal.append(Record(step.split, step.plan, finished[new], values[new], seconds))
                self.checkpoint()
        return finished, self.journal.outcomes(step.split, step.plan, len(split.samples))[finished]

    def known(self, split: str, plan: Plan) -> np.ndarray:
        """Which samples have an outcome in the journal, bool [samples]."""
        return ~np.isnan(self.journal.outcomes(split, plan, len(self.splits[split].samples)))
