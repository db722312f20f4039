from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rlens_jax.plans import Plan
from rlens_jax.search.curves import chain_order, held_out_plans, operator_result, random_points
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import rank_layers
from tests.reporting.synthetic import synthetic_results, with_margin
from tests.toy_search import one_at_a_time

WORTH = [3, 0, 2, 1, 4, 5]
"""Right samples of 20 that reducing a layer costs."""


def outcomes(plan):
    right = 20 - sum(WORTH[layer] for layer in plan.ffn)
    return {"toy": [1.0] * right + [0.0] * (20 - right)}


def toy_result(search_all=None, num_random=3, images=None):
    def score(plan):
        value = -sum(WORTH[layer] for layer in plan.ffn) / 20
        return PlanScore(score=value, loss=-value, metrics={"toy": 1 + value})

    ranking = rank_layers(6, 1, "ffn", one_at_a_time(score))
    plans = held_out_plans(ranking, num_random, 0, search_all)
    return operator_result(
        ranking,
        {plan: outcomes(plan) for plan in plans},
        {"toy": 1.0},
        lambda plan, with_probes: len(plan.ffn) / (7 if with_probes else 6),
        num_random=num_random,
        seed=0,
        search_all=search_all,
        bootstrap_samples=50,
        relative=True,
        images=images or {"toy": np.arange(20)},
    )


@pytest.mark.parametrize(
    ("num_layers", "points"), [(12, (2, 4, 6, 8, 10)), (28, (5, 9, 14, 19, 23)), (4, (1, 2, 3)), (2, (1, 2)), (1, (1,))]
)
def test_random_rankings_are_tried_at_sixths(num_layers, points):
    assert random_points(num_layers) == points


def test_the_plans_are_all_that_is_needed_each_once_the_base_first():
    results = synthetic_results()
    plans = held_out_plans(results.operators["ffn"].ranking, 10, 0, None)
    assert plans[0] == Plan()
    assert len(set(plans)) == len(plans)
    # Two curves with L + 1 points and both ends in common; five plans of ten random orders, few equal.
    assert 60 < len(plans) <= 2 * 11 + 2 + 50


def test_a_chain_runs_each_beginning_of_a_plan_once():
    """Its layers are the nodes of the tree of all plans, by what they do from layer 0 on: no order can run fewer."""
    ranking = synthetic_results().operators["ffn"].ranking
    plans = held_out_plans(ranking, 6, 0, None) + [Plan(attention=(k, 11)) for k in range(11)]
    chain = chain_order(plans, 12)
    assert sorted(chain, key=str) == sorted(set(plans), key=str)

    def layers_run(order):
        firsts = [before.lowest_difference(plan) for before, plan in pairwise(order)]
        return 12 + sum(12 - first for first in firsts)

    beginnings = {
        (k, *((layer in plan.attention, layer in plan.ffn) for layer in range(k))) for plan in plans for k in range(1, 13)
    }
    assert layers_run(chain) == len(beginnings)
    assert layers_run(held_out_plans(ranking, 6, 0, None)) < 0.75 * sum(12 - min(plan.ffn, default=11) for plan in plans)
    based = held_out_plans(replace(ranking, base=Plan((3,))), 2, 0, None)
    assert based[0] == Plan((3,))


def test_without_random_rankings_nothing_is_compared_with_chance():
    result = toy_result(num_random=0)
    assert result.random.orders == result.random.means == ()
    assert result.areas.keys() == {"searched", "position"}
    assert result.margins.keys() == result.beats.keys() == {"position"}
    with_random = toy_result()
    assert result.curves["searched"].metrics == with_random.curves["searched"].metrics
    assert {"random", "position"} == with_random.beats.keys()
    assert (
        len(held_out_plans(result.ranking, 0, 0, None)) == 7 + 5 - 1
    )  # two orders, of which both ends and one more are the same


def test_intervals_draw_images():
    """With all samples of one image, nothing is left to chance; the values stay."""
    ours, plain = toy_result(images={"toy": np.zeros(20, int)}), toy_result()
    for name, curve in ours.curves.items():
        np.testing.assert_allclose(curve.mean.low, curve.mean.value)
        np.testing.assert_allclose(curve.mean.high, curve.mean.value)
        np.testing.assert_array_equal(curve.mean.value, plain.curves[name].mean.value)
    assert ours.areas["searched"].low == pytest.approx(ours.areas["searched"].value)


def test_curve_losses_areas_and_saving_are_what_the_outcomes_say():
    result = toy_result()
    assert result.ranking.order == (5, 1, 3, 2, 0, 4)
    searched = result.curves["searched"]
    assert searched.mean.value.tolist() == pytest.approx([1, 0.75, 0.75, 0.7, 0.6, 0.45, 0.25])
    assert searched.losses == pytest.approx([0, 0.25, 0.25, 0.3, 0.4, 0.55, 0.75])
    assert result.curves["position"].order == (5, 4, 3, 2, 1, 0)
    assert result.area_points == (0, 1, 2, 3, 4, 5, 6)
    # Trapezoids over six equal steps.
    assert float(result.areas["searched"].value) == pytest.approx((0.625 + 0.75 + 0.75 + 0.7 + 0.6 + 0.45) / 6)
    position = np.trapezoid(result.curves["position"].mean.value) / 6
    assert float(result.margins["position"].value) == pytest.approx(float(result.areas["searched"].value) - position)
    assert searched.allowed == 0
    assert result.saving.plan == Plan()
    assert result.saving.flops == 0


def test_the_saving_is_at_the_largest_number_with_less_than_1_percent_loss():
    result = synthetic_results(80, 60).operators["ffn"]
    searched, number = result.curves["searched"], result.curves["searched"].allowed
    assert searched.losses[number] < 0.01
    assert all(loss >= 0.01 for loss in searched.losses[number + 1 :])
    assert result.saving.plan == Plan(ffn=result.ranking.order[:number])
    assert 0 < result.saving.flops_with_probes < result.saving.flops


def test_random_means_are_those_of_their_orders():
    random = toy_result().random
    for order, means in zip(random.orders, random.means, strict=True):
        expected = [1 - sum(WORTH[layer] for layer in order[:k]) / 20 for k in random.num_reduced]
        assert means == pytest.approx(expected)


def test_round_1_spread_ties_and_verdict():
    result = toy_result()
    # Layers 0-4 are candidates of round 1: layer 1 costs nothing, layer 4 four samples of 20.
    assert result.first_round_spread({"toy": 20}) == pytest.approx(4)
    assert result.tied_share == 0
    results = synthetic_results()
    assert with_margin(results, "ffn", 0.01).operators["ffn"].beats == {"position": True, "random": True}
    assert with_margin(results, "ffn", 0.0).operators["ffn"].beats == {"position": False, "random": False}


def test_outcomes_may_be_arrays():
    ranking = toy_result().ranking
    plans = held_out_plans(ranking, 1, 0, None)
    options = {"num_random": 1, "seed": 0, "search_all": None, "bootstrap_samples": 9, "relative": True}
    options["images"] = {"toy": np.arange(20)}
    arrays = {plan: {"toy": np.array(outcomes(plan)["toy"])} for plan in plans}
    lists = {plan: outcomes(plan) for plan in plans}
    from_arrays, from_lists = (
        operator_result(ranking, given, {"toy": 1.0}, lambda plan, probes: 0.0, **options) for given in (arrays, lists)
    )
    assert from_arrays.curves["searched"].metrics == from_lists.curves["searched"].metrics
