"""Costs, ladders and the whole search of a tiny model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.budget import Budget
from rlens_jax.config import JointConfig, RunConfig, SearchConfig
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.level_times import BucketTimes, LevelTimes, kept_level_times
from rlens_jax.engine.scoring import TeacherForcing
from rlens_jax.errors import UserError
from rlens_jax.flops import PUBLISHED_DECODERS, prefill_cost
from rlens_jax.hosts.processes import Processes
from rlens_jax.plan_file import read_plan
from rlens_jax.planning.frontier import Frontier
from rlens_jax.planning.planner import Planner, flops_costs, time_costs, useful_levels
from rlens_jax.plans import FULL, SKIP, STANDARD, TEXT, Levels, Plan, Reduction
from rlens_jax.reporting.front_report import front_summary, write_front
from rlens_jax.search.front import read_front
from rlens_jax.search.joint import Move, Space, State
from rlens_jax.search.journal import Journal
from rlens_jax.search.objective import dataset_metrics, plan_loss
from tests.engine.toy import LAYERS, REDUCTION, toy_programs, toy_split

LEVELS = Levels((FULL, STANDARD, SKIP), (FULL, STANDARD, SKIP))
QWEN = PUBLISHED_DECODERS["qwen2-vl-7b"]


def configured(attention, ffn):
    return RunConfig(joint=JointConfig(attention_levels=attention, ffn_levels=ffn))


def test_levels_that_save_nothing_are_left_out():
    many, few = [(64, 1792)], [(64, 200)]
    config = configured(("skip", "standard", "text", "512"), ("0.5", "standard", "skip"))
    assert useful_levels(config, QWEN.layer_sizes, many) == Levels((FULL, 512, STANDARD, TEXT, SKIP), (FULL, 0.5, STANDARD, SKIP))
    # With 200 visual tokens, ranges of 256 and 512 are dense; text alone saves 0.3 % of a layer.
    assert useful_levels(config, QWEN.layer_sizes, few) == Levels((FULL, SKIP), (FULL, 0.5, STANDARD, SKIP))
    with pytest.raises(UserError, match=r"no level that saves 0\.5 % of a layer at 200 visual tokens; name lower levels"):
        useful_levels(configured(("standard",), ()), QWEN.layer_sizes, few)


@pytest.mark.parametrize(
    ("field", "levels", "says"),
    [
        ("attention_levels", ("skpi",), "did you mean 'skip'"),
        ("attention_levels", ("0.5",), "whole number"),
        ("ffn_levels", ("text",), "standard, skip"),
        ("ffn_levels", ("1.5",), "ffn levels"),
        ("ffn_levels", ("skip", "skip"), "names a level twice"),
    ],
)
def test_what_is_no_level_is_refused(field, levels, says):
    with pytest.raises(UserError) as caught:
        JointConfig(**{field: levels})
    assert says in str(caught.value)


def test_flops_are_those_of_the_plan_without_the_last_layers_visual_rows():
    tokens = [(64, 1792), (30, 400)]
    costs = flops_costs(LEVELS, Reduction(), QWEN.layer_sizes, tokens)
    space = Space(QWEN.num_layers, {"attention": 2, "ffn": 2})
    state = space.start.moved(Move(3, "attention", 1), Move(3, "ffn", 2), Move(20, "ffn", 1))

    def total(plan):
        layers = QWEN.num_layers
        return sum(
            prefill_cost(QWEN.layer_sizes, text, [visual] * layers, plan, Reduction(), with_probes=True)
            for text, visual in tokens
        )

    plan = Plan.of({3: STANDARD, 27: SKIP}, {3: SKIP, 20: STANDARD, 27: SKIP})
    assert costs.share(state) == pytest.approx(total(plan) / total(Plan.of({27: SKIP}, {27: SKIP})), rel=1e-12)


def test_times_are_weighted_by_buckets_and_the_rest_is_what_a_prefill_takes_beside_its_layers():
    first = BucketTimes(8, 16, 4, 0.75, ((4.0, 2.0), (3.0, 1.0)), prefill=20.0)
    second = BucketTimes(8, 64, 2, 0.25, ((8.0, 4.0), (8.0, 4.0)), prefill=30.0)
    costs = time_costs(LevelTimes("cpu", Levels((FULL, SKIP), (FULL, SKIP)), (first, second)), num_layers=4)
    full = 0.75 * 4 / 4 + 0.25 * 8 / 2
    assert costs.layer[0][0] == full
    assert costs.layer[1][1] == 0.75 * 1 / 4 + 0.25 * 4 / 2
    assert costs.rest == pytest.approx(0.75 * 20 / 4 + 0.25 * 30 / 2 - 3 * full)
    assert costs.share(Space(4, {"attention": 1, "ffn": 1}).start) == 1.0


def test_a_time_table_is_measured_once_and_belongs_to_a_model_and_its_levels(tmp_path):
    path, measured = tmp_path / "level_times.json", []
    times = LevelTimes("cpu", LEVELS, (BucketTimes(8, 16, 4, 1.0, ((4.0,) * 3,) * 3, 14.0),))

    def measure():
        measured.append(1)
        return times

    assert kept_level_times(path, "hash", LEVELS, Processes(), measure) == times
    assert kept_level_times(path, "hash", LEVELS, Processes(), measure) == times
    assert len(measured) == 1
    with pytest.raises(UserError, match="times of another model_hash; move it away"):
        kept_level_times(path, "other", LEVELS, Processes(), measure)
    with pytest.raises(UserError, match="times of another levels"):
        kept_level_times(path, "hash", Levels(), Processes(), measure)
    path.write_text(path.read_text().replace("14.0", "-14.0"))
    with pytest.raises(UserError, match=r"buckets\[0\].prefill"):
        kept_level_times(path, "hash", LEVELS, Processes(), measure)


@pytest.fixture(scope="module")
def programs():
    return toy_programs(levels=LEVELS)


@pytest.fixture(scope="module")
def split(programs):
    return toy_split(programs)


def planner_of(programs, split, folder, budget, **joint):
    joint = JointConfig(budget=str(budget), cost="flops", milestones=0.1, **joint)
    config = RunConfig(search=SearchConfig(change="absolute"), reduction=REDUCTION, joint=joint)
    evaluator = Evaluator(TeacherForcing(programs), {"validation": split, "test": split}, Journal.open(folder, {}), 1e9)
    costs = flops_costs(LEVELS, REDUCTION, programs.config.layer_sizes, split.num_tokens)
    return Planner(evaluator, "validation", config, LEVELS, LAYERS, budget, costs)


def test_a_budget_below_the_least_plan_is_refused(programs, split, tmp_path):
    with pytest.raises(UserError, match=r"the plan that computes least has [\d.]+ % of the dense flops; ask for flops="):
        planner_of(programs, split, tmp_path, Budget("flops", 0.01)).check_reachable()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "lazy", "additive"])
def test_losses_of_the_path_are_those_of_its_plans_and_a_resumed_run_is_equal(programs, split, tmp_path, method):
    budget = Budget("flops", 0.8)
    planner = planner_of(programs, split, tmp_path, budget, method=method)
    path = planner.search(planner.space, "search")
    assert path.points[-1].cost <= 0.8 < path.points[-2].cost
    for point in path.points:
        plan = planner.plan(point.state)
        fresh = planner.evaluator.outcomes("validation", plan, [plan])[0]
        assert point.loss == plan_loss(dataset_metrics(fresh), planner.dense, relative=False)
    planner.evaluator.journal.__exit__(None, None, None)
    again = planner_of(programs, split, tmp_path, budget, method=method)
    done = again.evaluator.journal.num_outcomes
    assert again.search(again.space, "search") == path
    assert again.evaluator.journal.num_outcomes == done
    again.evaluator.journal.__exit__(None, None, None)


@pytest.mark.slow
def test_a_budget_of_loss_is_not_confirmed_by_a_handful_of_samples(programs, split, tmp_path):
    planner = planner_of(programs, split, tmp_path, Budget("loss", 0.5))
    path = planner.search(planner.space, "search")
    few = Frontier(planner, planner.evaluator, "test", "model", "data")
    assert few._published([], ()) == (0, "no move saves cost within the budget, so the dense model is published")
    strict = replace(planner, budget=Budget("loss", 0.01))
    front = Frontier(strict, planner.evaluator, "test", "model", "data").front(path)
    assert front.published == 0 and front.plan == planner.plan(planner.space.start)
    assert "too few to confirm a loss of 1.00 % with 95% confidence, which takes at least 299" in front.verdict
    write_front(front, tmp_path)
    assert read_front(tmp_path / "front.json")["points"][0]["kind"] == "dense"
    assert read_plan(tmp_path / "plan.json").plan == front.plan
    assert "* dense model" in front_summary(front, Path("x"))
    planner.evaluator.journal.__exit__(None, None, None)


@pytest.mark.slow
def test_a_reached_budget_is_published_beside_its_controls(programs, split, tmp_path):
    planner = planner_of(programs, split, tmp_path, Budget("flops", 0.8))
    front = Frontier(planner, planner.evaluator, "test", "model", "data").front(planner.search(planner.space, "search"))
    kinds = [point.kind for point in front.points]
    assert kinds[0] == "dense" and kinds[-2:] == ["position", "random"]
    published = front.points[front.published]
    assert (published.kind, published.cost <= 0.8) == ("joint", True)
    # FLOPs are counted by another function than the one that the search predicts with.
    assert [point.flops for point in front.points] == pytest.approx([point.cost for point in front.points], abs=0.02)
    assert all(point.time is not None for point in (front.points[0], published, *front.points[-2:]))
    assert published.search_loss is not None
    planner.evaluator.journal.__exit__(None, None, None)


def test_a_state_is_a_plan_and_back(programs, split, tmp_path):
    planner = planner_of(programs, split, tmp_path, Budget("flops", 0.8))
    state = State((0, 1, 2, 0, 2), (2, 0, 1, 0, 2))
    plan = planner.plan(state)
    assert plan == Plan.of({1: STANDARD, 2: SKIP, 4: SKIP}, {0: SKIP, 2: STANDARD, 4: SKIP})
    assert planner.share(plan) == planner.costs.share(state)
    assert planner.share(Plan.of({1: 7}, {})) is None
    assert np.isclose(planner.share(Plan()), 1.0)
    planner.evaluator.journal.__exit__(None, None, None)
