"""Evaluates plans: work items (plan, batch) on the devices, with every finished evaluation in the journal.

Base states are kept for as many batches as the memory budget allows: for a whole split if they fit, else for one part of its
batches at a time. All candidates of a round are evaluated on a part before the states of the next one are made.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.config import SearchConfig
from rlens_jax.console import Progress
from rlens_jax.engine.inputs import Batch, Split
from rlens_jax.engine.overflow import not_finite
from rlens_jax.engine.schedule import Step, memory_parts, schedule
from rlens_jax.engine.scoring import Scoring
from rlens_jax.models.prompt import FILLER
from rlens_jax.plan import Plan
from rlens_jax.search.journal import Journal, Record
from rlens_jax.search.objective import PlanScore, score_outcomes
from rlens_jax.search.search import ScoreRound

Outcomes = dict[str, np.ndarray]
"""The metric of each sample by dataset, float64 [samples]."""


@dataclass(frozen=True)
class Evaluator:
    """Outcomes of plans on the samples of each split.

    Attributes:
        scoring: evaluates a batch under plans.
        splits: samples and batches, by the name of the split.
        journal: keeps finished evaluations, which are not made again.
        state_bytes: memory for base states on a device.
        checkpoint: called after each plan whose outcomes are in the journal, at the same points on all processes; may raise to
            end the run.
    """

    scoring: Scoring
    splits: Mapping[str, Split]
    journal: Journal
    state_bytes: float
    checkpoint: Callable[[], None] = lambda: None

    def outcomes(self, split: str, base: Plan, plans: Sequence[Plan], progress: Progress | None = None) -> list[Outcomes]:
        """Each plan's outcomes on all datasets of a split.

        Args:
            base: the plan whose states the others start from; a nearer plan saves more layers.
            plans: the plans to evaluate; one may equal `base`.
            progress: counts the evaluations: one per plan and dataset.

        Raises:
            UserError: numbers are not finite, naming plan, sample and layer.
        """
        datasets, count = self.splits[split].datasets, len(self.splits[split].samples)
        todo = []
        for plan in dict.fromkeys(plans):
            if np.isnan(self.journal.outcomes(split, plan, count)).any():
                todo.append(plan)
            elif progress is not None:
                progress.advance(len(datasets), resumed=True)
        if todo:
            self._evaluate(split, base, todo, progress)
        outcomes = [self.journal.outcomes(split, plan, count) for plan in plans]
        return [{name: values[members] for name, members in datasets.items()} for values in outcomes]

    def chain(self, split: str, plans: Sequence[Plan], progress: Progress | None = None) -> list[Outcomes]:
        """As `outcomes`, but each plan starts from the states of the plan before it."""
        return [self.outcomes(split, plan, [plan], progress)[0] for plan in plans]

    def _evaluate(self, split: str, base: Plan, plans: Sequence[Plan], progress: Progress | None) -> None:
        batches = self.splits[split].batches
        parts = memory_parts([self.scoring.state_bytes(batch) for batch in batches], self.state_bytes)
        costs = [self.scoring.cost(base, plan) for plan in plans]
        results = [np.zeros(len(self.splits[split].samples)) for _ in plans]
        began = time.monotonic()
        for part in parts:
            if len(parts) > 1:
                self.scoring.release()
            members = [batches[number] for number in part]
            steps = schedule([batch.filled for batch in members], costs)
            last_step = {item.plan: i for i, step in enumerate(steps) for item in step.items if item}
            for i, run in self._running(members, base, plans, steps):
                self._enter(results, split, plans, steps[i], members[steps[i].batch], run)
                for plan in (plan for plan, last in last_step.items() if last == i):
                    if part is parts[-1]:
                        seconds, began = time.monotonic() - began, time.monotonic()
                        self._record(split, plans[plan], results[plan], seconds, progress)
                        self.checkpoint()

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
            running.append((i, self.scoring.start(batches[step.batch], base, chosen, blocks)))
            if len(running) > len(batches):
                yield running.popleft()
        yield from running

    def _enter(
        self, results: Sequence[np.ndarray], split: str, plans: Sequence[Plan], step: Step, batch: Batch, run: Any
    ) -> None:
        """Enter a step's rows into the results; a sample is right if any reference answer is reproduced."""
        samples = self.splits[split].samples
        rows = self.scoring.finish(run, samples)
        block = len(rows.sample) // len(step.items)
        for group, item in enumerate(step.items):
            mine = slice(group * block, (group + 1) * block)
            for number, right, finite in zip(*(part[mine].flat for part in rows), strict=True):
                if item is None or number == FILLER:
                    continue
                if not finite:
                    programs = self.scoring.programs
                    raise not_finite(programs, batch, int(number), samples[number].id, plans[item.plan], programs.reduction)
                results[item.plan][number] = max(results[item.plan][number], float(right))

    def _record(self, split: str, plan: Plan, result: np.ndarray, seconds: float, progress: Progress | None) -> None:
        """Write those of a plan's outcomes to the journal that it has not."""
        (new,) = np.isnan(self.journal.outcomes(split, plan, len(result))).nonzero()
        self.journal.append(Record(split, plan, new, result[new], seconds))
        if progress is not None:
            progress.advance(len(self.splits[split].datasets))


def round_scorer(
    evaluator: Evaluator, split: str, dense: Mapping[str, float], search: SearchConfig, progress: Progress | None = None
) -> ScoreRound:
    """The scores that `rank_layers` asks for, on a split with the dense metrics `dense`; see `score_outcomes`."""
    alpha, relative = search.penalty, search.change == "relative"

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        outcomes = evaluator.outcomes(split, base, candidates, progress)
        return [score_outcomes(each, dense, alpha=alpha, relative=relative) for each in outcomes]

    return score_round
