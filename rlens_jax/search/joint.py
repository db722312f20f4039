"""The joint search: which layer is best reduced next, in which operator and how far, by the loss per cost saved.

Every operator has a ladder of levels: 0 is full, each further one computes less (operators' settings in `rlens_jax.plans`). A
state has a level per layer and operator, and a move takes one layer down one ladder. The search knows states, costs and losses
alone; what a level computes is the evaluator's matter.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlens_jax.plans import OPERATORS, Operator
from rlens_jax.search.objective import comparable

BARRED = -1e15
"""The preference for a move that breaks the budget: below that of any other move."""
_ALLOWED = BARRED / 2
"""A move that is preferred less is barred."""


class Move(NamedTuple):
    """One layer, taken down one ladder to `level`."""

    layer: int
    operator: Operator
    level: int


@dataclass(frozen=True)
class State:
    """The level of each layer, per operator; 0 is full."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]

    def levels(self, operator: Operator) -> tuple[int, ...]:
        """The levels of an operator."""
        return self.attention if operator == "attention" else self.ffn

    def moved(self, *moves: Move) -> "State":
        """The state after some moves."""
        state = self
        for layer, operator, level in moves:
            levels = state.levels(operator)
            levels = (*levels[:layer], level, *levels[layer + 1 :])
            state = replace(state, attention=levels) if operator == "attention" else replace(state, ffn=levels)
        return state


@dataclass(frozen=True)
class Space:
    """The states of a model.

    Attributes:
        num_layers: L.
        lowest: the lowest level of each operator's ladder, 0 if it is never reduced.
        jump: whether a move may pass levels.
        searched: the operators that moves reduce.
    """

    num_layers: int
    lowest: Mapping[Operator, int]
    jump: bool = False
    searched: tuple[Operator, ...] = OPERATORS

    @property
    def start(self) -> State:
        """The dense model without what it computes for nothing: no answer depends on visual rows of the last layer."""
        dense = (0,) * self.num_layers
        return State(dense, dense).moved(*(Move(self.num_layers - 1, operator, self.lowest[operator]) for operator in OPERATORS))

    @property
    def end(self) -> State:
        """The state that computes least, of all operators."""
        return State(*((self.lowest[operator],) * self.num_layers for operator in OPERATORS))

    def all_moves(self) -> list[Move]:
        """Every move to any level, from the start."""
        return replace(self, jump=True).moves(self.start)

    def moves(self, state: State) -> list[Move]:
        """All moves from a state: one level down each, or with `jump` to any lower level."""
        moves = []
        for layer in range(self.num_layers):
            for operator in self.searched:
                level, lowest = state.levels(operator)[layer], self.lowest[operator]
                stop = lowest if self.jump else min(level + 1, lowest)
                moves += [Move(layer, operator, lower) for lower in range(level + 1, stop + 1)]
        return moves


@dataclass(frozen=True)
class Costs:
    """What states cost, as shares of `Space.start`.

    Attributes:
        layer: [attention level][ffn level], the cost of a layer in any unit.
        rest: the cost of what no state changes, in the same unit: the last layer's text rows, for one.
    """

    layer: tuple[tuple[float, ...], ...]
    rest: float = 0.0

    def share(self, state: State) -> float:
        """The cost of a state relative to that of the dense model, in which the last layer skips the same rows."""
        counted = list(zip(state.attention, state.ffn, strict=True))[:-1]
        dense = len(counted) * self.layer[0][0] + self.rest
        return (math.fsum(self.layer[attention][ffn] for attention, ffn in counted) + self.rest) / dense


class Loss(NamedTuple):
    """The loss of a state on the samples of the search; a lower bound if its evaluation stopped early."""

    value: float
    bound: bool = False


Prefer = Callable[[int, float], float]
"""`prefer(number, loss)`: how much a candidate is preferred if that is its loss; it never rises with the loss."""
ScoreMoves = Callable[[State, Sequence[State], Prefer, float], Sequence[Loss]]
"""`score(base, candidates, prefer, least)`: the candidates' losses in their order; the likely winner comes first.

A candidate may have a bound as its loss if, at this bound, it is preferred less than another candidate at its final loss, or less
than `least`. In the call `score(base, [base], prefer, -math.inf)` the loss is final.
"""


@dataclass(frozen=True)
class Limits:
    """When a search ends, and what counts as no loss.

    Attributes:
        loss: the largest loss that a move may lead to; None for no limit.
        cost: the share of the dense cost at which the search ends; None for no target.
        noise: a move that adds at most this loss adds none.
    """

    loss: float | None = None
    cost: float | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A move that was scored: its gain, as a share of the dense cost, and the loss that it leads to."""

    move: Move
    gain: float
    loss: Loss


@dataclass(frozen=True)
class JointRound:
    """One round.

    Attributes:
        trials: the moves that were scored, in the order of layers and operators.
        chosen: the move that was taken; None if all were barred.
        ties: the other moves that are preferred as much, before ties were broken.
    """

    trials: tuple[Trial, ...]
    chosen: Move | None
    ties: tuple[Move, ...]


@dataclass(frozen=True)
class PathPoint:
    """A state of the path, with its cost relative to dense and its loss in the search.

    Attributes:
        predicted: the loss that an additive search expected.
    """

    state: State
    cost: float
    loss: float
    predicted: float | None = None


@dataclass(frozen=True)
class Path:
    """The states that a search went through, least reduced first, and the rounds after the ones ranked by position."""

    points: tuple[PathPoint, ...]
    rounds: tuple[JointRound, ...]

    @property
    def num_scored(self) -> int:
        """The number of moves that were scored."""
        return sum(len(each.trials) for each in self.rounds)

    @property
    def stopped_early(self) -> int:
        """The number of those whose evaluation stopped early."""
        return sum(trial.loss.bound for each in self.rounds for trial in each.trials)


def preference(loss: float, before: float, gain: float, limits: Limits) -> float:
    """How much a move is preferred that leads from the loss `before` to `loss` and saves `gain`.

    Moves without loss come first, by their gain; then the others, by their loss per gain; then barred ones.
    """
    if limits.loss is not None and comparable(loss) > limits.loss:
        return BARRED
    added = comparable(loss - before)
    return gain if added <= limits.noise else -added / gain


def search_jointly(
    space: Space, costs: Costs, score: ScoreMoves, limits: Limits, *, position_layers: int = 0, lazy: bool = False
) -> Path:
    """The path of the joint search from the dense model on.

    The last layer is at its lowest levels from the start: that changes no answer. The last `position_layers` layers then take the
    first level of both ladders, last layer first, as long as the loss allows it. Then each round scores the moves that save cost,
    those of these layers included, and takes the one that `preference` prefers; among equals (to 12 digits) the one with the
    larger gain, then the later layer, then the FFN, then the lower level.

    Args:
        lazy: score the moves one by one, first those that were best when they were last scored, until one of them is at least as
            good as the rest was; a move that was never scored counts as without loss. This finds a path of the same choices if no
            move's loss per gain ever falls. A barred move is not tried again.
    """
    state = space.start
    loss = score(state, [state], lambda number, loss: 0.0, -math.inf)[0].value
    points, rounds = [PathPoint(state, costs.share(state), loss)], []
    for layer in reversed(range(space.num_layers - position_layers, space.num_layers - 1)):
        first = [Move(layer, operator, min(1, space.lowest[operator])) for operator in space.searched]
        longer = state.moved(*(move for move in first if costs.share(state.moved(move)) < costs.share(state)))
        (new,) = score(state, [longer], _reached(limits), _ALLOWED)
        if preference(new.value, loss, 1.0, limits) == BARRED:
            break
        state, loss = longer, new.value
        points.append(PathPoint(state, costs.share(state), loss))
    known: dict[Move, float] = {}
    while limits.cost is None or points[-1].cost > limits.cost:
        gains = {move: costs.share(state) - costs.share(state.moved(move)) for move in space.moves(state)}
        gains = {move: gain for move, gain in gains.items() if comparable(gain) > 0}
        found = _Scoring(state, loss, gains, score, limits).round(known, lazy)
        if found.trials:
            rounds.append(found)
        if found.chosen is None:
            break
        known = {move: added for move, added in known.items() if move[:2] != found.chosen[:2]}
        state = state.moved(found.chosen)
        loss = next(trial.loss.value for trial in found.trials if trial.move == found.chosen)
        points.append(PathPoint(state, costs.share(state), loss))
    return Path(tuple(points), tuple(rounds))


def _reached(limits: Limits) -> Prefer:
    """A preference for the only candidate of a round: whether its loss is within the limit."""
    return lambda number, loss: preference(loss, 0.0, 1.0, limits)


@dataclass(frozen=True)
class _Scoring:
    """One round from a state; `gains` has the moves that save cost."""

    state: State
    loss: float
    gains: Mapping[Move, float]
    score: ScoreMoves
    limits: Limits

    def round(self, known: dict[Move, float], lazy: bool) -> JointRound:
        """Score moves and choose one. `known` holds the loss that each move added when it was last scored, and is updated."""
        likely = sorted(self.gains, key=lambda move: self._place(move, self._expected(move, known)))
        if lazy:
            likely = [move for move in likely if known.get(move, 0.0) < math.inf]
        size = 1 if lazy else max(1, len(likely))
        preferred: dict[Move, float] = {}
        trials: list[Trial] = []
        for first in range(0, len(likely), size):
            tried = likely[first : first + size]
            best_place = min(itertools.starmap(self._place, preferred.items()), default=(math.inf,))
            if self._place(tried[0], self._expected(tried[0], known)) > best_place:
                break
            for move, found in zip(tried, self._score(tried, max(-best_place[0], _ALLOWED)), strict=True):
                trials.append(Trial(move, self.gains[move], found))
                preferred[move] = self._preference(move, found.value)
                known[move] = math.inf if preferred[move] == BARRED else found.value - self.loss
        open_moves = [trial.move for trial in trials if not trial.loss.bound and preferred[trial.move] > BARRED]
        best = max((comparable(preferred[move]) for move in open_moves), default=None)
        for trial in trials:
            if trial.loss.bound and comparable(preferred[trial.move]) >= (_ALLOWED if best is None else best):
                raise ValueError(f"{trial.move} was dropped at the loss {trial.loss.value}, but may be the best move")
        equal = [move for move in open_moves if comparable(preferred[move]) == best]
        chosen = min(equal, key=self._among_equals, default=None)
        ordered = tuple(sorted(trials, key=lambda trial: trial.move))
        return JointRound(ordered, chosen, tuple(sorted(move for move in equal if move != chosen)))

    def _score(self, tried: Sequence[Move], least: float) -> Sequence[Loss]:
        def prefer(number: int, loss: float) -> float:
            return self._preference(tried[number], loss)

        losses = self.score(self.state, [self.state.moved(move) for move in tried], prefer, least)
        if len(losses) != len(tried):
            raise ValueError(f"{len(tried)} moves got {len(losses)} losses")
        return losses

    def _preference(self, move: Move, loss: float) -> float:
        return preference(loss, self.loss, self.gains[move], self.limits)

    def _expected(self, move: Move, known: Mapping[Move, float]) -> float:
        """How much a move is preferred if it adds what it added when it was last scored."""
        added = known.get(move, 0.0)
        return BARRED if added == math.inf else self._preference(move, self.loss + added)

    def _place(self, move: Move, preferred: float) -> tuple[float, ...]:
        """Sorts moves that are preferred so much, the one to take first."""
        return -comparable(preferred), *self._among_equals(move)

    def _among_equals(self, move: Move) -> tuple[float, ...]:
        """Sorts the moves that are preferred as much, the one to take first."""
        return -comparable(self.gains[move]), -move.layer, move.operator != "ffn", -move.level


def evaluated(path: Path, score: ScoreMoves, limits: Limits) -> Path:
    """The path of an additive search with its real losses, up to the last state that is within the limit of loss."""
    points = [path.points[0]]
    for point in path.points[1:]:
        (loss,) = score(points[-1].state, [point.state], _reached(limits), _ALLOWED)
        if preference(loss.value, 0.0, 1.0, limits) == BARRED:
            break
        points.append(replace(point, loss=loss.value, predicted=point.loss))
    return Path(tuple(points), path.rounds)


def in_order(space: Space, costs: Costs, moves: Sequence[Move], cost: float) -> State:
    """The first state at or below `cost` if moves are taken in this order; the last one if none is. Needs no evaluation."""
    state = space.start
    for move in moves:
        if costs.share(state) <= cost:
            break
        if move.level > state.levels(move.operator)[move.layer]:
            state = state.moved(move)
    return state


def last_layers_first(space: Space) -> list[Move]:
    """The control without a search: every layer to its lowest levels, the last layer first."""
    layers = reversed(range(space.num_layers - 1))
    return [Move(layer, operator, space.lowest[operator]) for layer in layers for operator in OPERATORS]


def additive(base: State, losses: Mapping[Move, float], dense: float) -> ScoreMoves:
    """A scorer that evaluates nothing: a state's loss is the dense loss and what each of its moves adds alone [DOP, ShortV].

    Args:
        base: the state that the losses were measured from.
        losses: the loss after each single move from `base`.
        dense: the loss of `base`.
    """

    def predicted(state: State) -> float:
        added = []
        for operator in OPERATORS:
            pairs = enumerate(zip(base.levels(operator), state.levels(operator), strict=True))
            added += [losses[Move(layer, operator, level)] - dense for layer, (before, level) in pairs if level != before]
        return dense + math.fsum(added)

    return lambda base, candidates, prefer, least: [Loss(predicted(candidate)) for candidate in candidates]
