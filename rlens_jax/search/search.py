"""The Layer Ranking Algorithm: in which order the layers of one operator are best reduced, and its one-shot approximation.

The search hands out the plans of a whole round at once: they share their base, which an evaluator can use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlens_jax.config import SearchMethod
from rlens_jax.errors import UserError
from rlens_jax.plans import Operator, Plan
from rlens_jax.search.objective import PlanScore, comparable

ScoreRound = Callable[[Plan, list[Plan]], Sequence[PlanScore]]
"""`score_round(base, candidates)`: the candidates' scores, in their order.

Each candidate is the base with one more layer, except in the call `score_round(base, [base])`. The candidates are in evaluation
order: the first ones are likely to score best. Those that cannot score best may have a bound as their score; see `Race`.
"""


@dataclass(frozen=True)
class Round:
    """One round of the greedy search.

    Attributes:
        base: the plan that every candidate adds one layer to.
        layers: the layers tried, ascending.
        scores: their plans' scores, in the same order.
        chosen: the layer appended to the ranking.
        ties: the other layers with the chosen layer's score, after rounding, ascending.
    """

    base: Plan
    layers: tuple[int, ...]
    scores: tuple[PlanScore, ...]
    chosen: int
    ties: tuple[int, ...]

    @property
    def chosen_score(self) -> PlanScore:
        """The score of the base with the chosen layer."""
        return self.scores[self.layers.index(self.chosen)]


@dataclass(frozen=True)
class Ranking:
    """The order in which an operator's layers are best reduced, and all scores behind it.

    Attributes:
        operator: the ranked operator.
        base: the plan that the ranking starts from; dense unless the other operator is reduced in every plan.
        order: all L layers, the best to reduce first.
        base_score: the score of `base`.
        prefix_scores: the scores of the first 1, 2, ... L_p layers, which are ranked by position.
        rounds: the rounds of the other layers; one if they were ranked in one shot.
        method: how the other layers were ranked.
        noise: scores that differ by at most this are ties.
    """

    operator: Operator
    base: Plan
    order: tuple[int, ...]
    base_score: PlanScore
    prefix_scores: tuple[PlanScore, ...]
    rounds: tuple[Round, ...]
    method: SearchMethod = "greedy"
    noise: float = 0.0

    @property
    def stopped_early(self) -> int:
        """The number of candidates whose evaluation stopped early."""
        return sum(score.bound for round_ in self.rounds for score in round_.scores)

    @property
    def num_candidates(self) -> int:
        """The number of candidates of all rounds."""
        return sum(len(round_.scores) for round_ in self.rounds)

    def curve(self) -> list[PlanScore]:
        """The scores with the first 0, 1, ... layers of the order reduced: all L, or up to the first one ranked in one shot."""
        return [self.base_score, *self.prefix_scores, *(round_.chosen_score for round_ in self.rounds)]


def rank_layers(
    num_layers: int,
    position_layers: int | None,
    operator: Operator,
    score_round: ScoreRound,
    base: Plan | None = None,
    method: SearchMethod = "greedy",
    noise: float = 0.0,
) -> Ranking:
    """Rank all layers of `operator`: the last ones by position, the others by greedy search or in one shot.

    Each round tries every unranked layer on top of the ranked ones and appends the layer whose plan scores best; among equal
    scores (to 12 digits) the later layer (our decision). The last round has one candidate, which is scored for the curve. In one
    shot, there is one round, and its scores sort all layers; its candidates must be evaluated in full.

    Args:
        num_layers: decoder layers, L.
        position_layers: L_p, how many of the last layers are ranked by position, last layer first. 0 searches all layers, L
            none; None is L // 4 (our decision, the paper does not say).
        base: the plan to start from, dense by default; it may reduce the other operator only.
        noise: scores that differ by at most this are equal: what rounding alone can make of a score.

    Raises:
        UserError: `position_layers` is outside 0..L, or the base does not fit.
    """
    base = Plan() if base is None else base
    position_layers = num_layers // 4 if position_layers is None else position_layers
    if not 0 <= position_layers <= num_layers:
        raise UserError(f"position_layers must be from 0 to the {num_layers} layers, not {position_layers}")
    base.validate(num_layers)
    if base.layers(operator):
        raise UserError(f"the base of a ranking of {operator} must leave {operator} dense, not {base.label()}")

    order = list(position_ranking(num_layers)[:position_layers])
    (base_score,) = _scores(score_round, base, [base])
    prefixes = prefix_plans(operator, order, base)
    prefix_scores = tuple(_scores(score_round, shorter, [longer])[0] for shorter, longer in pairwise(prefixes))

    rounds: list[Round] = []
    ranked = prefixes[-1]
    while len(order) < num_layers:
        layers = [layer for layer in range(num_layers) if layer not in order]
        rounds.append(_round(score_round, operator, ranked, layers, rounds[-1] if rounds else None, noise))
        if method == "one_shot":
            if any(score.bound for score in rounds[-1].scores):
                raise ValueError("layers cannot be sorted by bounds of their scores")
            order += evaluation_order(layers, rounds[-1], noise)
        else:
            order.append(rounds[-1].chosen)
            ranked = ranked.with_layer(operator, order[-1])
    return Ranking(operator, base, tuple(order), base_score, prefix_scores, tuple(rounds), method, noise)


def _round(
    score_round: ScoreRound, operator: Operator, base: Plan, layers: Sequence[int], before: Round | None, noise: float
) -> Round:
    """One round, whose candidates are evaluated in the order of the round before."""
    tried = evaluation_order(layers, before)
    by_layer = dict(zip(tried, _scores(score_round, base, [base.with_layer(operator, layer) for layer in tried]), strict=True))
    scores = tuple(by_layer[layer] for layer in layers)
    best = max(comparable(score.score) for score in scores if not score.bound)
    for layer, score in by_layer.items():
        if score.bound and comparable(score.score) >= comparable(best - noise):
            raise ValueError(f"layer {layer} was dropped at {score.score}, but the best score is {best}")
    equal = comparable(best - noise)
    *ties, chosen = (layer for layer in layers if comparable(by_layer[layer].score) >= equal)
    return Round(base, tuple(layers), scores, chosen, tuple(ties))


def evaluation_order(layers: Sequence[int], before: Round | None, noise: float = 0.0) -> list[int]:
    """The layers by their scores and bounds in the round before, best first; the later ones first among equals or without one.

    The next layer is the latest of those whose scores are at most `noise` below the best score left.
    """
    scores = {} if before is None else dict(zip(before.layers, before.scores, strict=True))
    left = sorted(layers, key=lambda layer: (-comparable(scores[layer].score) if scores else 0.0, -layer))
    order: list[int] = []
    while left and scores:
        equal = comparable(scores[left[0]].score - noise)
        order.append(max(layer for layer in left if comparable(scores[layer].score) >= equal))
        left.remove(order[-1])
    return order + left


def _scores(score_round: ScoreRound, base: Plan, candidates: list[Plan]) -> tuple[PlanScore, ...]:
    scores = tuple(score_round(base, candidates))
    if len(scores) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates got {len(scores)} scores")
    return scores


def num_evaluations(num_layers: int, position_layers: int, method: SearchMethod) -> int:
    """Plans that one search evaluates: the base, L_p prefixes, and n (n + 1) / 2 candidates for n = L - L_p; n in one shot."""
    searched = num_layers - position_layers
    candidates = searched if method == "one_shot" else searched * (searched + 1) // 2
    return candidates + position_layers + 1


def prefix_plans(operator: Operator, order: Sequence[int], base: Plan | None = None) -> list[Plan]:
    """The plans that reduce the first 0, 1, ... all layers of `order` on top of `base`."""
    plans = [Plan() if base is None else base]
    for layer in order:
        plans.append(plans[-1].with_layer(operator, layer))
    return plans


def position_ranking(num_layers: int) -> tuple[int, ...]:
    """The ranking by position alone: the last layer first."""
    return tuple(reversed(range(num_layers)))
