import numpy as np
import pytest

from rlens_jax.search.confirmation import HeldOutLoss as Loss
from rlens_jax.search.confirmation import held_out_losses, last_confirmed, least_samples, milestones
from rlens_jax.search.joint import Path, PathPoint, State

ANYWHERE = State((0,), (0,))


def path(*costs):
    return Path(tuple(PathPoint(ANYWHERE, cost, 0.0) for cost in costs), ())


def test_milestones_are_at_every_step_of_cost_and_at_the_end():
    marked = milestones(path(1.0, 0.99, 0.95, 0.93, 0.84, 0.83, 0.82))
    assert [point.cost for point in marked] == [0.95, 0.84, 0.82]
    assert [point.cost for point in milestones(path(1.0, 0.98))] == [0.98]
    assert [point.cost for point in milestones(path(1.0, 0.9, 0.7), 0.25)] == [0.7]
    assert milestones(path(1.0)) == ()


def test_a_path_is_followed_up_to_the_first_failure():
    losses = [Loss(0.0, 0.004), Loss(0.002, 0.01), Loss(0.005, 0.011), Loss(0.0, 0.002)]
    assert last_confirmed(losses, 0.01) == 2
    assert last_confirmed(losses, 0.02) == 4
    assert last_confirmed(losses, 0.001) == 0


def test_too_few_samples_cannot_confirm_even_a_plan_that_changes_nothing():
    for loss in (0.01, 0.02, 0.1):
        least = least_samples(loss)
        assert 1 - 0.05 ** (1 / least) <= loss < 1 - 0.05 ** (1 / (least - 1))
    assert least_samples(0.01) == 299


def right(share, size, seed):
    return (np.random.default_rng(seed).random(size) < share).astype(float)


def losses_of(plan, dense, images=None, relative=True):
    images = images or {name: np.arange(len(values)) for name, values in dense.items()}
    return held_out_losses([plan], dense, images, relative=relative, samples=1000, seed=0)[0]


def test_the_bound_is_the_one_sided_one_of_paired_outcomes():
    """0.95 quantile: mean + 1.645 standard errors of the differences, not of the two scores."""
    dense = right(0.9, 800, 0)
    plan = np.where(right(0.03, 800, 1) == 1, 1 - dense, dense)
    lost = dense - plan
    found = losses_of({"a": plan}, {"a": dense}, relative=False)
    assert found.value == pytest.approx(lost.mean())
    assert found.bound == pytest.approx(lost.mean() + 1.645 * lost.std() / np.sqrt(800), abs=6e-4)


def test_losses_are_means_over_datasets_relative_to_dense():
    dense, plan = {"a": np.array([1.0, 1, 0, 0]), "b": np.ones(4)}, {"a": np.array([1.0, 0, 0, 0]), "b": np.ones(4)}
    assert losses_of(plan, dense, relative=True).value == pytest.approx(0.25)
    assert losses_of(plan, dense, relative=False).value == pytest.approx(0.125)


def test_questions_about_one_image_are_drawn_together():
    dense = np.ones(400)
    plan = np.repeat(right(0.97, 100, 2), 4)
    images = {"a": np.repeat(np.arange(100), 4)}
    assert losses_of({"a": plan}, {"a": dense}, images).bound > losses_of({"a": plan}, {"a": dense}).bound + 0.005


def test_a_true_loss_above_the_budget_is_rarely_confirmed():
    """A property of the whole rule: many milestones with a loss of 3.6 % at a budget of 3 % pass in at most about 5 % of runs."""
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(30):
        dense = np.ones(400)
        losses = held_out_losses(
            [{"a": (draw.random(400) > 0.036).astype(float)} for _ in range(6)],
            {"a": dense},
            {"a": np.arange(400)},
            relative=True,
            samples=100,
            seed=0,
        )
        wrong += last_confirmed(losses, 0.03) > 0
    assert wrong <= 4
