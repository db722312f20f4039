"""Searches the best plan under a budget on the validation samples: states of `search.joint` as plans, and their costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rlens_jax.budget import Budget
from rlens_jax.config import RunConfig
from rlens_jax.console import Progress
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import FIDELITY, noise_floor
from rlens_jax.engine.level_times import LevelTimes
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.errors import UserError
from rlens_jax.flops import LayerSizes, layer_cost
from rlens_jax.plans import FULL, OPERATORS, Level, Levels, Operator, Plan, Reduction, chain
from rlens_jax.search.joint import (
    Costs,
    Limits,
    Loss,
    Path,
    Prefer,
    ScoreMoves,
    Space,
    State,
    additive,
    evaluated,
    search_jointly,
)
from rlens_jax.search.objective import dataset_metrics, relative_changes

LEAST_SAVING = 0.005
"""A level that saves less of a layer's multiply-adds is left out."""


def useful_levels(config: RunConfig, sizes: LayerSizes, tokens: Sequence[tuple[int, int]]) -> Levels:
    """The ladders of a run: configured levels that compute something of their own and save `LEAST_SAVING` or more of a layer.

    Args:
        tokens: text and visual tokens of each sample; the mean numbers count.

    Raises:
        UserError: no level is left.
    """
    levels, reduction = config.joint.levels, config.reduction
    text, visual = (round(math.fsum(column) / len(tokens)) for column in zip(*tokens, strict=True))

    def cost(operator: Operator, level: Level) -> int:
        named: dict[str, Any] = {"attention": FULL, "ffn": FULL, operator: level}
        return layer_cost(sizes, text, visual, reduction, with_probes=True, **named)

    kept: dict[Operator, tuple[Level, ...]] = {}
    for operator in OPERATORS:
        full, *lower = chain(operator, getattr(levels, operator), reduction)
        dense = cost(operator, FULL)
        kept[operator] = (full, *(level for level in lower if 1 - cost(operator, level) / dense >= LEAST_SAVING))
    if not any(len(ladder) > 1 for ladder in kept.values()):
        raise UserError(
            f"joint.attention_levels and joint.ffn_levels have no level that saves {100 * LEAST_SAVING:g} % of a layer at "
            f"{visual} visual tokens; name lower levels, such as skip"
        )
    return Levels(kept["attention"], kept["ffn"])


def flops_costs(levels: Levels, reduction: Reduction, sizes: LayerSizes, tokens: Sequence[tuple[int, int]]) -> Costs:
    """Multiply-adds, probes counted, summed over samples with so many text and visual tokens."""

    def cost(attention: Level, ffn: Level) -> float:
        each = (layer_cost(sizes, *one, reduction, attention=attention, ffn=ffn, with_probes=True) for one in tokens)
        return float(sum(each))

    table = tuple(tuple(cost(attention, ffn) for ffn in levels.ffn) for attention in levels.attention)
    return Costs(table, rest=table[-1][-1])


def time_costs(times: LevelTimes, num_layers: int) -> Costs:
    """Measured seconds per row, over the buckets by their shares. `rest` is what a dense prefill takes beside its layers."""
    buckets = times.buckets
    weights = [bucket.share / bucket.rows for bucket in buckets]
    shape = range(len(times.levels.attention)), range(len(times.levels.ffn))
    table = tuple(
        tuple(math.fsum(w * b.layer[attention][ffn] for w, b in zip(weights, buckets, strict=True)) for ffn in shape[1])
        for attention in shape[0]
    )
    whole = math.fsum(w * bucket.prefill for w, bucket in zip(weights, buckets, strict=True))
    return Costs(table, rest=max(whole - (num_layers - 1) * table[0][0], table[-1][-1]))


@dataclass(frozen=True)
class Planner:
    """The joint search of a run.

    Attributes:
        evaluator: evaluates plans.
        split: the samples of the search.
        config: its `search` says how plans are scored, its `joint` how they are searched.
        levels: the ladders.
        num_layers: L.
        budget, costs: what is spent, and on what.
    """

    evaluator: Evaluator
    split: str
    config: RunConfig
    levels: Levels
    num_layers: int
    budget: Budget
    costs: Costs

    @property
    def space(self) -> Space:
        """All states of both operators."""
        lowest: Mapping[Operator, int] = {"attention": len(self.levels.attention) - 1, "ffn": len(self.levels.ffn) - 1}
        return Space(self.num_layers, lowest, self.config.joint.jump)

    def alone(self, operator: Operator) -> Space:
        """The states that reduce one operator only; the last layer skips both, as in the dense model."""
        return replace(self.space, searched=(operator,))

    @cached_property
    def limits(self) -> Limits:
        """What the search keeps to."""
        share, measure = self.budget.share, self.config.search.measure
        noise = noise_floor(self.evaluator, self.split) if measure in FIDELITY else 0.0
        return Limits(loss=share, noise=noise) if self.budget.kind == "loss" else Limits(cost=share, noise=noise)

    def check_reachable(self) -> None:
        """Raise UserError if even the plan that computes least costs more than the budget, or if nothing can be saved."""
        least = self.costs.share(self.space.end)
        if self.budget.kind != "loss" and least > self.budget.share:
            raise UserError(
                f"budget {self.budget}: the plan that computes least has {100 * least:.1f} % of the dense {self.budget.kind}; "
                f"ask for {self.budget.kind}={100 * least + 0.1:.1f}% or more, or allow lower levels"
            )

    def plan(self, state: State) -> Plan:
        """The plan of a state."""
        ladders = (self.levels.attention, self.levels.ffn)
        levels = zip(ladders, (state.attention, state.ffn), strict=True)
        attention, ffn = ({layer: ladder[level] for layer, level in enumerate(chosen)} for ladder, chosen in levels)
        return Plan.of(attention, ffn)

    def share(self, plan: Plan) -> float | None:
        """The share of the dense cost that a plan has; None if it has a level that the search has not."""
        attention, ffn = zip(*plan.settings(self.num_layers), strict=True)
        if not {*attention} <= {*self.levels.attention} or not {*ffn} <= {*self.levels.ffn}:
            return None
        places = (tuple(map(int, each)) for each in plan.indices(self.num_layers, self.levels))
        return self.costs.share(State(*places))

    @cached_property
    def dense(self) -> dict[str, float]:
        """The dense model's metrics on the samples of the search. UserError if a relative loss is not defined."""
        start = self.plan(self.space.start)
        metrics = dataset_metrics(self.evaluator.outcomes(self.split, start, [start])[0])
        relative_changes(metrics, metrics, relative=self.config.search.relative)
        return metrics

    def search(self, space: Space, label: str) -> Path:
        """The path of the configured search."""
        joint = self.config.joint
        most = sum(self.space.lowest.values()) * self.num_layers
        with Progress(label, most, "steps") as progress:
            score = self._scorer(progress.advance)
            if joint.method == "additive":
                return self._additive(space, score)
            lazy, prior = joint.method == "lazy", joint.position_layers
            return search_jointly(space, self.costs, score, self.limits, position_layers=prior, lazy=lazy)

    def _additive(self, space: Space, score: ScoreMoves) -> Path:
        start = space.start
        moves = space.all_moves()
        base = score(start, [start], _all_equal, -math.inf)[0].value
        singles = score(start, [start.moved(move) for move in moves], _all_equal, -math.inf)
        losses = {move: loss.value for move, loss in zip(moves, singles, strict=True)}
        path = search_jointly(space, self.costs, additive(start, losses, base), self.limits)
        return evaluated(path, score, self.limits)

    def _scorer(self, advance: Callable[[], None]) -> ScoreMoves:
        rounds = RoundScorer(self.evaluator, self.split, self.dense, self.config.search.by("greedy"))

        def score(base: State, candidates: Sequence[State], prefer: Prefer, least: float) -> list[Loss]:
            plans = [self.plan(state) for state in candidates]
            scores = rounds.race(self.plan(base), plans, lambda number, score: prefer(number, score.loss), least)
            advance()
            return [Loss(score.loss, score.bound) for score in scores]

        return score


def _all_equal(number: int, loss: float) -> float:
    """A preference under which every candidate is evaluated in full."""
    return 0.0
