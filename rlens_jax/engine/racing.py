"""Scores the candidates of a round: a race on the devices, in which those that cannot score best are dropped.

Each group's rows are ordered by how much they are expected to lower a candidate's bound, and cut into batches in this order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlens_jax.config import SearchConfig
from rlens_jax.console import Progress
from rlens_jax.engine.evaluator import Evaluator, Step, Tally
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.models.prompt import FILLER
from rlens_jax.plans import Plan
from rlens_jax.search.objective import PlanScore, score_outcomes
from rlens_jax.search.race import Difficulty, Race, Turn, most_gain_first, sample_weights


@dataclass(frozen=True)
class RoundScorer:
    """The scores that `rank_layers` asks for.

    Attributes:
        evaluator: evaluates the candidates.
        split: the name of the split.
        dense: the dense model's metrics on it.
        search: how plans are scored, and whether candidates are dropped.
        progress: counts the candidates that are evaluated or dropped.
        noise: scores that differ by at most this are ties.
    """

    evaluator: Evaluator
    split: str
    dense: Mapping[str, float]
    search: SearchConfig
    progress: Progress | None = None
    noise: float = 0.0

    def __call__(self, base: Plan, candidates: Sequence[Plan]) -> list[PlanScore]:
        """The scores of the candidates of a round, in their order; bounds for those that were dropped. Errors as of `race`."""
        return self.race(base, candidates, lambda number, score: score.score)

    def race(
        self, base: Plan, candidates: Sequence[Plan], preference: Callable[[int, PlanScore], float], floor: float = -np.inf
    ) -> list[PlanScore]:
        """Race candidates by `preference(number, score)`, which takes the place of the scores in what is returned.

        Args:
            floor: as of `Race`.

        Raises:
            UserError: numbers are not finite, naming plan, sample and layer.
        """
        evaluator, data = self.evaluator, self.evaluator.splits[self.split]
        difficulty = evaluator.difficulties.setdefault(self.split, Difficulty(len(data.samples), self.search.best_outcome))
        parts = evaluator.parts(self._batches(difficulty))
        tallies = [Tally(data.num_branches) for _ in candidates]
        decided = sum(bool(evaluator.known(self.split, plan).all()) for plan in candidates)
        self._advance(decided, resumed=True)
        held: Sequence[Batch] | None = None

        def start(turn: Turn) -> Step:
            nonlocal held
            if held is not parts[turn.part]:
                held = parts[turn.part]
                evaluator.scoring.hold(held)
            plan, tally = candidates[turn.candidate], tallies[turn.candidate]
            return evaluator.start(Step(self.split, plan, base, held[turn.block], tally))

        def finish(step: Step) -> tuple[np.ndarray, np.ndarray]:
            nonlocal decided
            finished = evaluator.finish(step)
            if step.run is not None and evaluator.known(self.split, step.plan).all():
                decided += 1
                self._advance(1)
            return finished

        def preferred(number: int, outcomes: np.ndarray) -> PlanScore:
            score = self._score(outcomes)
            return replace(score, score=preference(number, score))

        stopping = self.search.stopping == "exact"
        race = Race(
            len(candidates),
            list(map(len, parts)),
            len(data.samples),
            preferred,
            stopping=stopping,
            floor=floor,
            best=self.search.best_outcome,
            noise=self.noise,
        )
        race.run(start, finish)
        self._advance(len(candidates) - decided)
        difficulty.add(race.outcomes)
        return race.scores()

    def _score(self, outcomes: np.ndarray) -> PlanScore:
        by_dataset = {name: outcomes[members] for name, members in self.evaluator.splits[self.split].datasets.items()}
        search = self.search
        return score_outcomes(by_dataset, self.dense, alpha=search.alpha, relative=search.relative, best=search.best_outcome)

    def _batches(self, difficulty: Difficulty) -> list[Batch]:
        """Batches of all rows, first those that are expected to lower a bound most for their cost."""
        data = self.evaluator.splits[self.split]
        gains = difficulty.gains(sample_weights(data.datasets, self.dense, relative=self.search.relative)) / data.num_branches
        batches, gained = [], []
        for pool in data.pools:
            of_rows = _row_gains(pool, gains)
            order = np.argsort(-of_rows, axis=1, kind="stable").astype(np.int32)
            for batch in pool.batches(order):
                batches.append(batch)
                gained.append(np.take_along_axis(of_rows, batch.rows, axis=1).sum())
        costs = [batch.pool.bucket.slots * batch.pool.block_rows for batch in batches]
        return [batches[place] for place in most_gain_first(gained, costs)]

    def _advance(self, plans: int, *, resumed: bool = False) -> None:
        if self.progress is not None and plans:
            self.progress.advance(plans, resumed=resumed)


def _row_gains(pool: Pool, gains: np.ndarray) -> np.ndarray:
    """The sum of the gains of each row's branches, float64 [W, R]; filler comes last."""
    real = pool.samples != FILLER
    return np.where(real, gains[pool.samples], 0.0).sum(axis=2) - ~real.any(axis=2)
