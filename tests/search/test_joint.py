"""The joint search on random tables, against a plain search that scores every move in full and applies the rule as written."""

from dataclasses import replace

import numpy as np
import pytest

from rlens_jax.plans import OPERATORS
from rlens_jax.search.joint import BARRED, Costs, Limits, Loss, Move, Space, State, additive, preference, search_jointly
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.race import Race

LADDERS = {"attention": 2, "ffn": 2}


class Tables:
    """Random harms of every (layer, operator, level) to each sample, with few values, so that there are many ties."""

    def __init__(self, seed, num_layers=4, num_samples=30, lowest=LADDERS, jump=False):
        draw = np.random.default_rng(seed)
        self.space = Space(num_layers, lowest, jump)
        shape = (num_layers, 2, max(lowest.values()), num_samples)
        harm = draw.random((num_layers, 2, 1, 1)) * 0.5
        self._harm = np.cumsum(np.where(draw.random(shape) < harm, draw.integers(-1, 3, shape), 0), axis=2)
        self._harm[-1] = 0  # the last layer changes no answer
        self._margin = draw.integers(0, 4, num_samples)
        self.num_samples = num_samples
        saved = np.sort(draw.integers(1, 5, (2, max(lowest.values()))), axis=1)
        saved[0] -= draw.integers(0, 2)  # a level may save nothing
        table = [[16.0 - a - f for f in (0, *saved[1, : lowest["ffn"]])] for a in (0, *saved[0, : lowest["attention"]])]
        self.costs = Costs(tuple(map(tuple, table)), rest=3.0)
        self.evaluated = 0

    def outcomes(self, state):
        total = np.zeros(self.num_samples)
        for place, operator in enumerate(OPERATORS):
            for layer, level in enumerate(state.levels(operator)):
                if level:
                    total += self._harm[layer, place, level - 1]
        return (total <= self._margin).astype(float)

    def loss(self, state):
        return 1 - self.outcomes(state).mean()

    def full(self, base, candidates, prefer, least):
        return [Loss(self.loss(state)) for state in candidates]

    def raced(self, base, candidates, prefer, least):
        """The scorer of a run: a race that drops candidates."""

        def score(number, outcomes):
            unknown = np.isnan(outcomes)
            loss = 1 - np.where(unknown, 1.0, outcomes).mean()
            return PlanScore(prefer(number, loss), loss, {}, bool(unknown.any()))

        blocks = [range(first, min(first + 4, self.num_samples)) for first in range(0, self.num_samples, 4)]
        race = Race(len(candidates), [len(blocks)], self.num_samples, score, floor=least)

        def finish(turn):
            self.evaluated += len(blocks[turn.block])
            return blocks[turn.block], self.outcomes(candidates[turn.candidate])[list(blocks[turn.block])]

        race.run(lambda turn: turn, finish)
        return [Loss(score.loss, score.bound) for score in race.scores()]


def plain_search(tables, limits):
    """The rule as it is written, with nothing saved: lists of states, losses, and sets of tied moves."""
    space, state = tables.space, tables.space.start
    states, ties = [state], []
    while limits.cost is None or tables.costs.share(state) > limits.cost:
        found = []
        for layer in range(space.num_layers):
            for operator in OPERATORS:
                for level in range(state.levels(operator)[layer] + 1, space.lowest[operator] + 1):
                    if level > state.levels(operator)[layer] + 1 and not space.jump:
                        continue
                    moved = state.moved(Move(layer, operator, level))
                    gain = tables.costs.share(state) - tables.costs.share(moved)
                    loss = tables.loss(moved)
                    if round(gain, 12) <= 0 or (limits.loss is not None and round(loss, 12) > limits.loss):
                        continue
                    added = round(loss - tables.loss(state), 12)
                    tier = (0, round(-gain, 12)) if added <= limits.noise else (1, round(added / gain, 12))
                    found.append((tier, round(-gain, 12), -layer, operator != "ffn", -level, Move(layer, operator, level)))
        if not found:
            break
        best = min(found)
        ties.append({each[-1] for each in found if each[0] == best[0]} - {best[-1]})
        state = state.moved(best[-1])
        states.append(state)
    return states, ties


CASES = [
    (seed, seed % 2 == 1, limits) for seed in range(6) for limits in (Limits(), Limits(loss=0.2), Limits(cost=0.8, noise=0.05))
]


@pytest.mark.parametrize(("seed", "jump", "limits"), CASES)
@pytest.mark.parametrize("scorer", ["full", "raced"])
def test_the_path_is_that_of_a_plain_search(seed, jump, limits, scorer):
    tables = Tables(seed, jump=jump)
    path = search_jointly(tables.space, tables.costs, getattr(tables, scorer), limits)
    states, ties = plain_search(tables, limits)
    assert [point.state for point in path.points] == states
    assert [set(each.ties) for each in path.rounds if each.chosen] == ties
    assert [point.loss for point in path.points] == [tables.loss(state) for state in states]
    assert [point.cost for point in path.points] == [tables.costs.share(state) for state in states]


def test_a_race_evaluates_less():
    raced = total = 0
    for seed in range(4):
        tables = Tables(seed)
        path = search_jointly(tables.space, tables.costs, tables.raced, Limits(loss=0.2))
        raced, total = raced + tables.evaluated, total + (path.num_scored + 1) * tables.num_samples
        assert 0 <= path.stopped_early < path.num_scored
    assert raced < 0.8 * total


def test_nothing_is_tried_that_saves_nothing_and_the_path_always_saves():
    for seed in range(4):
        tables = Tables(seed)
        path = search_jointly(tables.space, tables.costs, tables.full, Limits())
        assert all(trial.gain > 0 for each in path.rounds for trial in each.trials)
        costs = [point.cost for point in path.points]
        assert costs == sorted(costs, reverse=True) and costs[0] == 1.0


def test_a_lazy_search_of_additive_harms_finds_the_same_choices():
    """Losses that add up never make a move better, so re-scoring the best is enough."""
    draw = np.random.default_rng(0)
    counts = np.zeros(2, int)
    for _ in range(8):
        harm = np.cumsum(draw.integers(0, 5, (5, 2, 2)), axis=2) / 100
        tables = Tables(int(draw.integers(100)), num_layers=5)
        scored = []

        def score(base, candidates, prefer, least, harm=harm, scored=scored):
            scored.append(len(candidates))
            return [Loss(additive_loss(state, harm)) for state in candidates]

        full = search_jointly(tables.space, tables.costs, score, Limits(loss=0.15))
        counts[0] += sum(scored)
        scored.clear()
        lazy = search_jointly(tables.space, tables.costs, score, Limits(loss=0.15), lazy=True)
        assert [point.state for point in lazy.points] == [point.state for point in full.points]
        counts[1] += sum(scored)
    assert counts[1] < 0.8 * counts[0]


def test_a_lazy_search_stops_moves_that_cannot_beat_the_best_one():
    """Its path has real losses, and each choice is the best of those scored."""
    evaluated, limits = {}, Limits(loss=0.2)
    for lazy in (False, True):
        evaluated[lazy] = 0
        for seed in range(6):
            tables = Tables(seed)
            path = search_jointly(tables.space, tables.costs, tables.raced, limits, lazy=lazy)
            evaluated[lazy] += tables.evaluated
            assert [point.loss for point in path.points] == [tables.loss(point.state) for point in path.points]
            for point, each in zip(path.points, path.rounds, strict=False):
                preferred = {
                    trial.move: round(preference(tables.loss(point.state.moved(trial.move)), point.loss, trial.gain, limits), 12)
                    for trial in each.trials
                }
                if each.chosen is not None:
                    assert preferred[each.chosen] == max(preferred.values())
    assert evaluated[True] < 0.75 * evaluated[False]


def additive_loss(state, harm):
    return sum(
        harm[layer, place, level - 1]
        for place, operator in enumerate(OPERATORS)
        for layer, level in enumerate(state.levels(operator)[:-1])
        if level
    )


def test_a_predicted_loss_is_the_sum_of_single_losses():
    tables = Tables(3)
    start = tables.space.start
    deep = replace(tables.space, jump=True)
    single = {move: tables.loss(start.moved(move)) for move in deep.moves(start)}
    dense = tables.loss(start)
    predict = additive(start, single, dense)
    state = start.moved(Move(0, "ffn", 1), Move(2, "attention", 2))
    expected = dense + (single[Move(0, "ffn", 1)] - dense) + (single[Move(2, "attention", 2)] - dense)
    assert [loss.value for loss in predict(start, [start, state], None, None)] == pytest.approx([dense, expected])


def test_layers_by_position_come_first_and_can_go_deeper():
    tables = Tables(1, num_layers=5)
    tables.costs = Costs(((9.0, 7.0, 6.0), (8.0, 6.0, 5.0), (7.0, 5.0, 4.0)))
    path = search_jointly(tables.space, tables.costs, tables.full, Limits(), position_layers=3)
    first, second, third = (point.state for point in path.points[:3])
    assert first == tables.space.start
    assert second.ffn[3] == 1 and second.ffn[2] == 0
    assert third.ffn[2] == 1
    assert path.points[-1].state.ffn[2:] == (2, 2, 2)
    only = search_jointly(tables.space, tables.costs, tables.full, Limits(loss=-1.0), position_layers=3)
    assert [point.state for point in only.points] == [first]


def test_the_last_layer_is_free_and_costs_the_same_dense():
    space = Space(3, LADDERS)
    assert space.start == State((0, 0, 2), (0, 0, 2))
    costs = Costs(((4.0, 2.0, 1.0), (3.0, 1.5, 0.5), (2.0, 1.0, 0.25)), rest=2.0)
    assert costs.share(space.start) == 1.0
    assert costs.share(space.end) == (2 * 0.25 + 2.0) / (2 * 4.0 + 2.0)
    assert costs.share(State((0, 1, 2), (1, 2, 2))) == (2.0 + 0.5 + 2.0) / 10.0


def test_without_loss_the_gain_decides_and_else_the_loss_per_gain():
    limits = Limits(loss=0.1, noise=0.01)
    assert preference(0.06, 0.05, 0.2, limits) == 0.2
    assert preference(0.07, 0.05, 0.2, limits) == pytest.approx(-0.1)
    assert preference(0.07, 0.05, 0.4, limits) == pytest.approx(-0.05)
    assert preference(0.101, 0.05, 0.9, limits) == BARRED
    assert preference(0.1, 0.05, 0.9, limits) > BARRED


def test_a_dropped_move_that_might_be_best_is_an_error():
    tables = Tables(0)

    def wrong(base, candidates, prefer, least):
        return [Loss(0.0, bound=candidate != base) for candidate in candidates]

    with pytest.raises(ValueError, match="may be the best move"):
        search_jointly(tables.space, tables.costs, wrong, Limits())


@pytest.mark.parametrize(
    ("harm", "chosen", "ties"),
    [
        ({(0, "attention"): 0.04, (2, "ffn"): 0.02}, (0, "attention", 1), [(2, "ffn", 1)]),  # the larger gain
        ({(0, "ffn"): 0.02, (1, "ffn"): 0.02}, (1, "ffn", 1), [(0, "ffn", 1)]),  # the later layer
        ({(1, "ffn"): 0.02, (1, "attention"): 0.04, (2, "attention"): 0.05}, (1, "attention", 1), [(1, "ffn", 1)]),
    ],
)
def test_equal_moves_are_told_apart_by_gain_and_then_by_layer(harm, chosen, ties):
    costs = Costs(((10.0, 9.0), (8.0, 7.0)))  # attention saves twice as much

    def score(base, candidates, prefer, least):
        def loss(state):
            reduced = [(layer, operator) for operator in OPERATORS for layer in range(3) if state.levels(operator)[layer]]
            return sum(harm.get(each, 0.5) for each in reduced)

        return [Loss(loss(state)) for state in candidates]

    path = search_jointly(Space(4, {"attention": 1, "ffn": 1}), costs, score, Limits(loss=0.1))
    assert (path.rounds[0].chosen, list(path.rounds[0].ties)) == (chosen, ties)
