"""The exact race of the candidates of a round: which block of samples each is evaluated on next, and which are dropped.

A candidate is dropped once its best possible score, with every sample right that it was not evaluated on, is below the final
score of another one. A candidate that ties with the best is never dropped, so the winner and its ties are those of a full
evaluation.

Decisions depend on the outcomes entered so far and on nothing else. `Race.run` enters them in the order in which the blocks were
started, with the same number in progress; so a resumed run, whose first outcomes are known, decides alike.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from rlens_jax.search.objective import RIGHT, Metrics, PlanScore, comparable, relative_changes

IN_PROGRESS = 2
"""Blocks in progress at a time: the device has the next one when it finishes one."""

Work = TypeVar("Work")


class Turn(NamedTuple):
    """A block that a candidate is evaluated on: its number in a part of the samples."""

    candidate: int
    part: int
    block: int


class _Stage(NamedTuple):
    part: int
    candidates: tuple[int, ...]


class Race:
    """One race. Candidates are numbered in evaluation order: the one that is likely to win is 0, the leader.

    The leader is evaluated in full. Then two candidates that are not decided take turns, block by block. If the base states of
    all samples do not fit into memory, the samples have several parts, and a part is finished for all candidates before the next
    one begins. The leader takes the parts from the last to the first, so that the other candidates find the states of part 0.

    Args:
        candidates: their number.
        blocks: number of blocks of each part, each at least 1; all blocks together have every sample once.
        samples: number of samples.
        score: the score of a candidate for outcomes float64[samples]; NaN, an unknown outcome, counts as `best`.
        stopping: whether candidates are dropped.
        floor: a candidate is also dropped once it cannot reach this score.
        best: the largest outcome that a sample can have.
        noise: a candidate is kept while it may be at most so much below the best final score.

    Attributes:
        outcomes: float64[candidates, samples], NaN where a candidate was not evaluated.
    """

    def __init__(
        self,
        candidates: int,
        blocks: Sequence[int],
        samples: int,
        score: Callable[[int, np.ndarray], PlanScore],
        *,
        stopping: bool = True,
        floor: float = -np.inf,
        best: float = RIGHT,
        noise: float = 0.0,
    ):
        self.outcomes = np.full((candidates, samples), np.nan)
        self._blocks = tuple(blocks)
        self._score = score
        self._stopping = stopping
        parts, everyone = range(len(blocks)), tuple(range(candidates))
        if stopping:
            alone = [_Stage(part, everyone[:1]) for part in reversed(parts)]
            self._stages = deque([*alone, *(_Stage(part, everyone[1:]) for part in parts)])
        else:
            self._stages = deque(_Stage(part, everyone) for part in parts)
        self._started = [0] * candidates  # blocks of the part
        self._entered = [0] * candidates  # blocks of all parts
        self._scores = self.scores()
        self._dropped: set[int] = set()
        self._most, self._noise = best, noise
        self._least = floor
        self._in_progress: deque[Turn] = deque()

    def next(self) -> Turn | None:
        """The block to start now. None if that depends on a block in progress, or if the race is over."""
        while self._stages:
            part, candidates = self._stages[0]
            if any(turn.part != part for turn in self._in_progress):
                return None  # whose states take the memory
            waiting = [c for c in candidates if c not in self._dropped and self._started[c] < self._blocks[part]]
            if waiting:
                busy = [turn.candidate for turn in self._in_progress]
                chosen = min(waiting[:2], key=lambda c: (busy.count(c), self._started[c]))
                turn = Turn(chosen, part, self._started[chosen])
                self._started[chosen] += 1
                self._in_progress.append(turn)
                return turn
            self._stages.popleft()
            self._started = [0] * len(self._started)
        return None

    def enter(self, candidate: int, samples: Sequence[int] | np.ndarray, outcomes: Sequence[float] | np.ndarray) -> None:
        """Enter the outcomes of the block that was started first of those in progress.

        Args:
            candidate: its candidate.
            samples: the samples that are known now.
            outcomes: one per sample, such as 0 (wrong) or 1 (right).

        Raises:
            ValueError: another block is next, a sample is known already, or an outcome is above `best`, so that no bound holds.
        """
        if not self._in_progress or self._in_progress[0].candidate != candidate:
            raise ValueError(f"the next block to finish is not one of candidate {candidate}")
        values, numbers = np.asarray(outcomes, np.float64), np.asarray(samples, np.int64)
        if np.isnan(values).any() or (values > self._most).any() or not np.isnan(self.outcomes[candidate, numbers]).all():
            raise ValueError(f"outcomes must be at most {self._most:g}, of samples without one")
        self._in_progress.popleft()
        self.outcomes[candidate, numbers] = values
        self._entered[candidate] += 1
        self._scores[candidate] = score = self._score(candidate, self.outcomes[candidate])
        if self._entered[candidate] == sum(self._blocks):
            if score.bound:
                raise ValueError(f"candidate {candidate} has no outcome of some samples after the last block")
            self._least = max(self._least, comparable(comparable(score.score) - self._noise))
        if self._stopping:
            self._dropped.update(c for c, one in enumerate(self._scores) if comparable(one.score) < self._least)

    def scores(self) -> list[PlanScore]:
        """The candidates' scores, of the dropped ones as bounds; the race is over."""
        return [self._score(candidate, outcomes) for candidate, outcomes in enumerate(self.outcomes)]

    def run(
        self,
        start: Callable[[Turn], Work],
        finish: Callable[[Work], tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]],
    ) -> None:
        """Run the whole race.

        Args:
            start: starts a block on the devices; does nothing for a block whose outcomes are known.
            finish: waits for a started block; returns the samples and their outcomes.
        """
        running: deque[tuple[Turn, Work]] = deque()
        while True:
            while len(running) < IN_PROGRESS and (turn := self.next()) is not None:
                running.append((turn, start(turn)))
            if not running:
                return
            turn, work = running.popleft()
            self.enter(turn.candidate, *finish(work))


class Difficulty:
    """How much plans lost on each sample of a split, which decides the order in which candidates see the samples.

    A round's order must come from evaluations that were finished before the round: else a resumed run has another one.

    Args:
        samples: their number.
        best: the largest outcome that a sample can have.
    """

    def __init__(self, samples: int, best: float = RIGHT):
        self._best = best
        self._lost, self._seen = np.zeros(samples), np.zeros(samples)

    def add(self, outcomes: np.ndarray) -> None:
        """Add the outcomes of finished evaluations: float64[..., samples], NaN for unknown."""
        rows = np.reshape(outcomes, (-1, len(self._seen)))
        self._lost += np.nansum(self._best - rows, axis=0)
        self._seen += np.isfinite(rows).sum(axis=0)

    def gains(self, weights: np.ndarray) -> np.ndarray:
        """By how much a candidate's bound is expected to fall if it is evaluated on a sample: float64[samples]."""
        return weights * self._lost / np.maximum(self._seen, 1)


def sample_weights(datasets: Mapping[str, np.ndarray], dense: Metrics, *, relative: bool) -> np.ndarray:
    """The change of a score by one wrong sample, without the penalty: float64[samples]. Errors as of `relative_changes`.

    Args:
        datasets: the numbers of each dataset's samples.
        dense: the dense model's metrics, to which changes are relative if `relative`.
    """
    relative_changes(dense, dense, relative=relative)
    weights = np.zeros(sum(map(len, datasets.values())))
    for name, members in datasets.items():
        weights[members] = 1 / (len(members) * (dense[name] if relative else 1.0))
    return weights


def most_gain_first(gains: Sequence[float] | np.ndarray, costs: Sequence[float] | np.ndarray) -> list[int]:
    """Rows or blocks, by number, in the order of their gain per cost; among equal ones the lower number first."""
    return np.argsort(-np.asarray(gains, np.float64) / np.asarray(costs, np.float64), kind="stable").tolist()
