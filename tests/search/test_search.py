from dataclasses import replace

import pytest

from rlens_jax.errors import UserError
from rlens_jax.plans import Plan
from rlens_jax.search.curves import random_rankings
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import evaluation_order, num_evaluations, position_ranking, prefix_plans, rank_layers
from tests.toy_search import one_at_a_time


def score(value):
    return PlanScore(score=float(value), loss=-float(value), metrics={"toy": 1.0 + value})


class Recorder:
    """Scores whole rounds by a function of the reduced layers, and remembers what it was asked."""

    def __init__(self, value, operator="ffn"):
        self.value, self.operator, self.calls = value, operator, []

    def __call__(self, base, candidates):
        self.calls.append((base, candidates))
        return [score(self.value(frozenset(plan.layers(self.operator)))) for plan in candidates]

    @property
    def num_plans(self):
        return sum(len(candidates) for _, candidates in self.calls)


def additive(values):
    return lambda layers: sum(values[layer] for layer in layers)


def test_an_additive_objective_gives_the_order_of_its_terms():
    values = [-0.5, 0.25, -0.125, 0.5, -1.0]
    ranking = rank_layers(5, 0, "ffn", Recorder(additive(values)))
    assert ranking.order == (3, 1, 2, 0, 4)
    assert [point.score for point in ranking.curve()] == [0, 0.5, 0.75, 0.625, 0.125, -0.875]
    assert all(round_.ties == () for round_ in ranking.rounds)


# What a set of reduced layers scores, with interactions: 0 is best alone, but 1 and 2 are good only together,
# and 3 spoils what it is combined with.
TABLE = {
    (): 0.0,
    (0,): -0.1, (1,): -0.4, (2,): -0.3, (3,): -0.2,
    (0, 1): -0.6, (0, 2): -0.5, (0, 3): -0.9, (1, 2): 0.5, (1, 3): -0.7, (2, 3): -0.8,
    (0, 1, 2): 0.2, (0, 1, 3): -0.9, (0, 2, 3): -1.0, (1, 2, 3): 0.1,
    (0, 1, 2, 3): -1.5,
}  # fmt: skip


def table_value(layers):
    return TABLE[tuple(sorted(layers))]


def test_greedy_search_worked_out_by_hand():
    # Round 1: 0 (-0.1) beats 3, 2, 1. Round 2, with 0: 2 (-0.5) beats 1 (-0.6) and 3 (-0.9).
    # Round 3, with 0 and 2: 1 (+0.2) beats 3 (-1.0). Round 4: 3 is left. That greedy search never sees
    # the best pair (1, 2) is right: it is greedy.
    ranking = rank_layers(4, 0, "attention", Recorder(table_value, "attention"))
    assert ranking.order == (0, 2, 1, 3)
    assert [point.score for point in ranking.curve()] == [0.0, -0.1, -0.5, 0.2, -1.5]
    second = ranking.rounds[1]
    assert second.base == Plan(attention=(0,))
    assert second.layers == (1, 2, 3)
    assert [scored.score for scored in second.scores] == [-0.6, -0.5, -0.9]
    assert (second.chosen, second.chosen_score.score) == (2, -0.5)


def test_the_position_part_counts_in_the_search():
    # Layer 3 goes first, by position. With it, 1 (-0.7) beats 2 (-0.8) and 0 (-0.9).
    # Then, with 3 and 1, 2 (0.1) beats 0 (-0.9).
    ranking = rank_layers(4, 1, "ffn", Recorder(table_value))
    assert ranking.order == (3, 1, 2, 0)
    assert [scored.score for scored in ranking.prefix_scores] == [-0.2]
    assert [point.score for point in ranking.curve()] == [0.0, -0.2, -0.7, 0.1, -1.5]


def test_ties_go_to_the_later_layer_and_are_recorded():
    ranking = rank_layers(5, 0, "ffn", Recorder(additive([0.0, -1.0, 0.0, -1.0, 0.0])))
    assert ranking.order == (4, 2, 0, 3, 1)
    assert [round_.ties for round_ in ranking.rounds] == [(0, 2), (0,), (), (1,), ()]


def test_scores_are_compared_after_rounding():
    # 0.1 + 0.2 is a little above 0.3: without rounding layer 0 would win.
    values = {frozenset({0}): 0.1 + 0.2, frozenset({1}): 0.3}
    ranking = rank_layers(2, 0, "ffn", Recorder(lambda layers: values.get(layers, 0.0)))
    assert ranking.order == (1, 0)
    assert ranking.rounds[0].ties == (0,)
    # A difference in the eleventh digit is a difference.
    values[frozenset({0})] = 0.3 + 1e-11
    ranking = rank_layers(2, 0, "ffn", Recorder(lambda layers: values.get(layers, 0.0)))
    assert ranking.order == (0, 1)
    assert ranking.rounds[0].ties == ()


@pytest.mark.parametrize(
    ("num_layers", "position_layers", "rounds_plans", "prefixes"),
    [(28, 0, 406, 0), (28, 7, 231, 7), (28, None, 231, 7), (28, 28, 0, 28), (3, None, 6, 0)],
)
def test_number_of_evaluations(num_layers, position_layers, rounds_plans, prefixes):
    recorder = Recorder(additive([0.01 * (layer % 5) for layer in range(num_layers)]))
    ranking = rank_layers(num_layers, position_layers, "ffn", recorder)
    prior = num_layers // 4 if position_layers is None else position_layers
    assert num_evaluations(num_layers, prior, "greedy") == recorder.num_plans
    one_shot = Recorder(recorder.value)
    rank_layers(num_layers, position_layers, "ffn", one_shot, method="one_shot")
    assert num_evaluations(num_layers, prior, "one_shot") == one_shot.num_plans == num_layers + 1
    assert sum(len(round_.scores) for round_ in ranking.rounds) == rounds_plans
    assert len(ranking.prefix_scores) == prefixes
    assert recorder.num_plans == rounds_plans + prefixes + 1
    asked = [plan for _, candidates in recorder.calls for plan in candidates]
    assert len(set(asked)) == len(asked)
    assert sorted(ranking.order) == list(range(num_layers))
    assert len(ranking.curve()) == num_layers + 1


def test_all_by_position():
    ranking = rank_layers(4, 4, "ffn", Recorder(table_value))
    assert ranking.order == position_ranking(4) == (3, 2, 1, 0)
    assert ranking.rounds == ()
    assert [point.score for point in ranking.curve()] == [0.0, -0.2, -0.8, 0.1, -1.5]


def test_every_candidate_is_its_base_with_one_layer_more():
    recorder = Recorder(table_value)
    rank_layers(4, 2, "ffn", recorder)
    assert recorder.calls[0] == (Plan(), [Plan()])
    for base, candidates in recorder.calls[1:]:
        for plan in candidates:
            assert set(plan.ffn) > set(base.ffn)
            assert len(plan.ffn) == len(base.ffn) + 1


def test_one_shot_sorts_by_the_scores_of_one_round():
    recorder = Recorder(table_value)
    ranking = rank_layers(4, 0, "ffn", recorder, method="one_shot")
    assert ranking.order == (0, 3, 2, 1)  # -0.1, -0.2, -0.3, -0.4; greedy is 0, 2, 1, 3
    assert ranking.method == "one_shot" and rank_layers(4, 0, "ffn", recorder).method == "greedy"
    assert [point.score for point in ranking.curve()] == [0.0, -0.1]
    (round_,) = ranking.rounds
    assert (round_.chosen, round_.layers) == (0, (0, 1, 2, 3))
    # With layer 3 by position, the others are tried on top of it: 1 (-0.7), 2 (-0.8), 0 (-0.9).
    assert rank_layers(4, 1, "ffn", Recorder(table_value), method="one_shot").order == (3, 1, 2, 0)
    ties = rank_layers(5, 0, "ffn", Recorder(additive([0.0, -1.0, 0.0, -1.0, 0.0])), method="one_shot")
    assert ties.order == (4, 2, 0, 3, 1)
    assert ties.rounds[0].ties == (0, 2)
    assert rank_layers(4, 4, "ffn", Recorder(table_value), method="one_shot").rounds == ()
    with pytest.raises(ValueError, match="sorted by bounds"):
        rank_layers(3, 0, "ffn", bounded([-0.5, -0.1, -0.2], {(0,): -0.15}), method="one_shot")


def test_scores_within_the_noise_are_ties():
    """0, 1 and 3 are equal, and so are 2 and 4: of each, the later layer goes first."""
    values = [0.0, -0.05, -0.3, -0.02, -0.31]
    for method in ("greedy", "one_shot"):
        ranking = rank_layers(5, 0, "ffn", Recorder(additive(values)), method=method, noise=0.06)
        assert (ranking.order, ranking.noise) == ((3, 1, 0, 4, 2), 0.06)
        assert ranking.rounds[0].ties == (0, 1)
    assert rank_layers(5, 0, "ffn", Recorder(additive(values)), noise=0.01).order == (0, 3, 1, 4, 2)
    assert rank_layers(5, 0, "ffn", Recorder(additive(values))).order == (0, 3, 1, 2, 4)
    with pytest.raises(ValueError, match=r"layer 0 was dropped at -0.15, but the best score is -0.1"):
        rank_layers(3, 0, "ffn", bounded([-0.5, -0.1, -0.2], {(0,): -0.15}), noise=0.06)


def test_candidates_come_in_the_order_of_the_round_before():
    recorder = Recorder(table_value)
    rank_layers(4, 0, "ffn", recorder)
    tried = [[(set(plan.ffn) - set(base.ffn)).pop() for plan in plans] for base, plans in recorder.calls[1:]]
    # Round 1: later layers first. Then by their scores: -0.1 for 0, -0.2 for 3, -0.3 for 2, -0.4 for 1; with 0, 2 beats 1.
    assert tried == [[3, 2, 1, 0], [3, 2, 1], [1, 3], [3]]
    ties = rank_layers(5, 0, "ffn", Recorder(additive([0.0, -1.0, 0.0, -1.0, 0.0]))).rounds[0]
    assert evaluation_order([0, 1, 2, 3], ties) == [2, 0, 3, 1]


def bounded(values, bounds):
    """Scores in which the layers of `bounds` are dropped."""
    return lambda base, plans: [
        replace(score(bounds.get(plan.ffn, sum(values[layer] for layer in plan.ffn))), bound=plan.ffn in bounds) for plan in plans
    ]


def test_a_dropped_candidate_neither_wins_nor_ties():
    (first, *_) = rank_layers(3, 0, "ffn", bounded([-0.5, -0.1, -0.2], {(0,): -0.15, (2,): -0.11})).rounds
    assert (first.chosen, first.ties) == (1, ())
    assert first.layers == (0, 1, 2)
    assert [(scored.score, scored.bound) for scored in first.scores] == [(-0.15, True), (-0.1, False), (-0.11, True)]
    assert evaluation_order([0, 2], first) == [2, 0]  # a bound counts as a score


@pytest.mark.parametrize("bound", [-0.1, -0.05, -0.1 + 1e-13, -0.1 - 1e-13])
def test_a_candidate_dropped_at_the_best_score_is_a_mistake(bound):
    with pytest.raises(ValueError, match=f"layer 2 was dropped at {bound}, but the best score is -0.1"):
        rank_layers(3, 0, "ffn", bounded([-0.5, -0.1, -0.2], {(2,): bound}))


def test_rounds_and_single_plans_give_the_same_ranking():
    by_rounds = rank_layers(4, 1, "ffn", Recorder(table_value))
    singly = rank_layers(4, 1, "ffn", one_at_a_time(lambda plan: score(table_value(plan.ffn))))
    assert by_rounds == singly


def test_a_base_of_the_other_operator_stays():
    base = Plan(attention=(0, 3))
    recorder = Recorder(table_value)
    ranking = rank_layers(4, 1, "ffn", recorder, base=base)
    assert ranking.base == base
    assert {plan.attention for _, candidates in recorder.calls for plan in candidates} == {(0, 3)}
    assert recorder.calls[0] == (base, [base])


def test_what_is_refused():
    for position_layers in (-1, 5):
        with pytest.raises(UserError, match=f"position_layers .*4 layers, not {position_layers}"):
            rank_layers(4, position_layers, "ffn", Recorder(table_value))
    with pytest.raises(UserError, match="must leave ffn dense"):
        rank_layers(4, 0, "ffn", Recorder(table_value), Plan(ffn=(1,)))
    with pytest.raises(UserError, match="layer 4"):
        rank_layers(4, 0, "ffn", Recorder(table_value), Plan(attention=(4,)))


def test_a_scorer_that_loses_a_plan_or_returns_nan_is_a_mistake():
    with pytest.raises(ValueError, match="4 candidates got 3 scores"):
        rank_layers(4, 0, "ffn", lambda base, plans: [score(0.0)] * min(3, len(plans)))
    with pytest.raises(ValueError, match="nan"):
        rank_layers(4, 0, "ffn", Recorder(lambda layers: float("nan")))


def test_prefix_plans():
    assert prefix_plans("attention", (2, 0), Plan(ffn=(1,))) == [
        Plan(ffn=(1,)),
        Plan(attention=(2,), ffn=(1,)),
        Plan(attention=(0, 2), ffn=(1,)),
    ]


def test_random_rankings():
    rankings = random_rankings(12, 5, seed=3)
    assert all(sorted(order) == list(range(12)) for order in rankings)
    assert len(set(rankings)) == 5
    assert random_rankings(12, 2, seed=3) == rankings[:2]
    assert random_rankings(12, 5, seed=4) != rankings
