"""Evaluators of toy searches: the slow twin of one that scores a round at once, and one that drops candidates."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from rlens_jax.config import SearchConfig
from rlens_jax.plans import Operator, Plan
from rlens_jax.search.objective import PlanScore, dataset_metrics, score_outcomes
from rlens_jax.search.race import Difficulty, Race, Turn, most_gain_first, sample_weights
from rlens_jax.search.search import ScoreRound


def one_at_a_time(score_plan: Callable[[Plan], PlanScore]) -> ScoreRound:
    """Score each plan by itself, without using the base."""
    return lambda base, candidates: [score_plan(plan) for plan in candidates]


class Table:
    """Random outcomes of every plan of one operator on a few samples, whole numbers of which make many ties.

    Attributes:
        datasets: the numbers of the samples of each dataset.
        dense: the dense model's metrics.
    """

    def __init__(self, seed: int, num_layers: int, operator: Operator):
        draw = np.random.default_rng(seed)
        sizes = draw.integers(4, 14, draw.integers(1, 4))
        ends = np.cumsum(sizes)
        numbers = draw.permutation(ends[-1])
        self.operator, self.num_samples = operator, int(ends[-1])
        self.datasets = {f"set {i}": numbers[end - size : end] for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
        harm = draw.integers(0, 4, (num_layers, 1)) / 4  # of a layer
        self._cost = np.where(draw.random((num_layers, self.num_samples)) < harm, draw.integers(-1, 3, (num_layers, 1)), 0)
        self._margin = draw.integers(-1, 4, self.num_samples)
        self._cost[:, numbers[ends - 1]] = draw.integers(0, 2)  # the dense model has one sample of each dataset right
        self._margin[numbers[ends - 1]] = draw.integers(0, 4)
        self.dense = dataset_metrics(self.by_dataset(self.outcomes(Plan())))

    def outcomes(self, plan: Plan) -> np.ndarray:
        """float64[samples]."""
        return (self._cost[list(plan.layers(self.operator))].sum(axis=0) <= self._margin).astype(np.float64)

    def by_dataset(self, outcomes: np.ndarray) -> dict[str, np.ndarray]:
        return {name: outcomes[members] for name, members in self.datasets.items()}


class Racing:
    """Scores the candidates of a round by a race, as the engine's evaluator does, on blocks of samples in several parts.

    Attributes:
        known: the outcomes of each plan that were evaluated, as the journal of a run has them.
        turns: the turns of all races, with the plan.
    """

    def __init__(self, table: Table, search: SearchConfig, *, size: int = 2, parts: int = 1):
        self.table, self.search, self.size, self.parts = table, search, size, parts
        self.known: dict[Plan, np.ndarray] = defaultdict(lambda: np.full(table.num_samples, np.nan))
        self.turns: list[tuple[Plan, int, int]] = []
        self.killed_after: int | None = None
        self._difficulty = Difficulty(table.num_samples)

    def __call__(self, base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        table, relative = self.table, self.search.change == "relative"
        weights = sample_weights(table.datasets, table.dense, relative=relative)
        order = most_gain_first(self._difficulty.gains(weights), np.ones(table.num_samples))
        blocks = [order[first : first + self.size] for first in range(0, len(order), self.size)]
        parts = [blocks[part :: self.parts] for part in range(min(self.parts, len(blocks)))]

        def score(candidate: int, outcomes: np.ndarray) -> PlanScore:
            return score_outcomes(table.by_dataset(outcomes), table.dense, alpha=self.search.penalty, relative=relative)

        def start(turn: Turn) -> tuple[Plan, list[int]]:
            self.turns.append((candidates[turn.candidate], turn.part, turn.block))
            return candidates[turn.candidate], parts[turn.part][turn.block]

        def finish(work: tuple[Plan, list[int]]) -> tuple[list[int], np.ndarray]:
            plan, samples = work
            if np.isnan(self.known[plan][samples]).any():
                if self.killed_after is not None:
                    self.killed_after -= 1
                    if not self.killed_after:
                        raise KeyboardInterrupt
                self.known[plan][samples] = table.outcomes(plan)[samples]
            return samples, self.known[plan][samples]

        stopping = self.search.stopping == "exact"
        race = Race(len(candidates), list(map(len, parts)), table.num_samples, score, stopping=stopping)
        race.run(start, finish)
        self._difficulty.add(race.outcomes)
        return race.scores()
