import random
from dataclasses import replace

import numpy as np
import pytest

from rlens_jax.errors import UserError
from rlens_jax.search.objective import comparable, dataset_metric, phi, plan_loss, relative_changes, score_outcomes, score_plan

DENSE = {"chart": 0.8, "doc": 50.0}


def test_the_metric_does_not_depend_on_the_order_of_samples():
    outcomes = [0.1, 1e16, 0.7, -1e16, 0.3] * 20
    shuffled = random.Random(0).sample(outcomes, len(outcomes))
    assert dataset_metric(outcomes) == dataset_metric(shuffled) == pytest.approx(0.22, abs=1e-15)
    assert sum(outcomes) != sum(shuffled)


def test_metric_of_right_and_wrong_answers():
    assert dataset_metric([1, 0, 1, 1]) == 0.75
    with pytest.raises(ValueError, match="without outcomes"):
        dataset_metric([])


def test_changes():
    metrics = {"doc": 55.0, "chart": 0.6}
    assert relative_changes(metrics, DENSE) == pytest.approx({"chart": -0.25, "doc": 0.1})
    assert relative_changes(metrics, DENSE, relative=False) == pytest.approx({"chart": -0.2, "doc": 5.0})


def test_phi_doubles_a_drop():
    assert [phi(x) for x in (0.5, 0.0, -0.5)] == [0.5, 0.0, -1.0]
    assert phi(-0.5, alpha=3.0) == -1.5
    assert phi(0.5, alpha=3.0) == 0.5


def test_score_has_the_penalty_and_loss_has_not():
    metrics = {"chart": 0.6, "doc": 55.0}
    assert score_plan(metrics, DENSE).score == pytest.approx(0.1 - 2 * 0.25)
    assert score_plan(metrics, DENSE, alpha=1.0).score == pytest.approx(0.1 - 0.25)
    assert plan_loss(metrics, DENSE) == pytest.approx((0.25 - 0.1) / 2)
    assert score_plan(metrics, DENSE, relative=False).score == pytest.approx(5.0 - 2 * 0.2)
    assert plan_loss(metrics, DENSE, relative=False) == pytest.approx((0.2 - 5.0) / 2)


def test_score_plan_collects_them():
    metrics = {"chart": 0.6, "doc": 55.0}
    scored = score_plan(metrics, DENSE, alpha=3.0, relative=False)
    assert scored.score == pytest.approx(5.0 - 3 * 0.2)
    assert scored.loss == plan_loss(metrics, DENSE, relative=False)
    assert scored.metrics == metrics


def test_the_dense_model_scores_zero():
    scored = score_plan(DENSE, DENSE)
    assert (scored.score, scored.loss) == (0, 0)
    assert str(scored.loss) == "0.0"


def test_unknown_outcomes_count_as_right_and_make_a_bound():
    outcomes = {"chart": np.array([0.0, 1.0, np.nan, np.nan]), "doc": np.array([60.0, 50.0])}
    scored = score_outcomes(outcomes, DENSE, alpha=3.0)
    assert scored.bound
    assert scored.metrics == {"chart": 0.75, "doc": 55.0}
    assert replace(scored, bound=False) == score_plan(scored.metrics, DENSE, alpha=3.0)
    whole = score_outcomes({**outcomes, "chart": np.array([0.0, 1.0, 1.0, 0.0])}, DENSE, alpha=3.0)
    assert not whole.bound
    assert whole.score < scored.score and whole.loss > scored.loss


def test_unknown_divergences_count_as_none():
    outcomes = {"a": np.array([-0.5, np.nan]), "b": np.array([-0.25, -0.75])}
    scored = score_outcomes(outcomes, {"a": 0.0, "b": 0.0}, alpha=1.0, relative=False, best=0.0)
    assert (scored.score, scored.loss, scored.bound) == (-0.75, 0.375, True)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 7.0])
def test_no_score_falls_if_an_outcome_rises(alpha):
    """What the bound needs: metrics, changes, phi and their sum, all with their rounding, never fall."""
    changes = np.sort(np.concatenate([np.linspace(-2, 2, 101), np.random.default_rng(0).normal(0, 1e-12, 50)]))
    contributions = [phi(change, alpha) for change in changes.tolist()]
    assert contributions == sorted(contributions)
    draw = np.random.default_rng(1)
    for number in range(200):
        sizes = draw.integers(1, 12, 3)
        values = [draw.integers(0, 2, size).astype(float) if number % 2 else draw.random(size) for size in sizes]
        dense = {str(i): float(draw.random() + 0.01) for i in range(3)}
        scores = []
        for _ in range(12):
            of = {str(i): each.copy() for i, each in enumerate(values)}
            scores.append(score_outcomes(of, dense, alpha=alpha, relative=number % 3 > 0).score)
            chosen = values[draw.integers(3)]
            place = draw.integers(len(chosen))
            chosen[place] = min(1.0, chosen[place] + draw.choice([1e-16, 0.1, 1.0]))
        assert scores == sorted(scores)


def test_a_dataset_the_dense_model_fails_is_refused():
    with pytest.raises(UserError, match="dataset doc: the dense model scores 0"):
        score_plan({"chart": 1.0, "doc": 1.0}, {"chart": 0.5, "doc": 0.0})
    assert score_plan({"doc": 1.0}, {"doc": 0.0}, relative=False).score == 1.0


def test_other_datasets_than_the_dense_model_is_a_mistake():
    with pytest.raises(ValueError, match="chart"):
        score_plan({"chart": 0.8}, DENSE)


def test_comparisons_see_twelve_digits():
    assert 0.1 + 0.2 != 0.3
    assert comparable(0.1 + 0.2) == comparable(0.3)
    assert comparable(0.3) != comparable(0.3 + 2e-12)
    with pytest.raises(ValueError, match="nan"):
        comparable(float("nan"))
