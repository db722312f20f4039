"""Costs, ladders and the whole search of a tiny model."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from rlens_jax.budget import Budget
from rlens_jax.config import ComputeConfig, JointConfig, RunConfig, SearchConfig
from rlens_jax.data.images import load_image
from rlens_jax.engine import level_times
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import Fidelity
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.level_times import BucketTimes, LevelTimes, kept_level_times
from rlens_jax.engine.preparing import down_sampled
from rlens_jax.engine.scoring import TeacherForcing
from rlens_jax.engine.session import LoadedModel, ModelFolder, Session
from rlens_jax.engine.timing import Turn
from rlens_jax.errors import UserError
from rlens_jax.families import qwen2_vl
from rlens_jax.families.registry import ModelKind
from rlens_jax.flops import PUBLISHED_DECODERS, prefill_cost
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import ImageTokens
from rlens_jax.planning import frontier, plan_run
from rlens_jax.planning.frontier import Frontier, Rival
from rlens_jax.planning.plan_run import smaller_images, with_divergence
from rlens_jax.planning.planner import Planner, flops_costs, time_costs, useful_levels
from rlens_jax.plans import FULL, SKIP, STANDARD, TEXT, Levels, Plan, Reduction
from rlens_jax.search.confirmation import HeldOutLoss
from rlens_jax.search.front import PrefillTime, front_fields
from rlens_jax.search.joint import Move, Path, PathPoint, Space, State
from rlens_jax.search.journal import Journal
from rlens_jax.search.objective import dataset_metrics, plan_loss
from tests.engine.toy import CONFIG, LAYERS, REDUCTION, SHAPES, ToyPreparer, answered, png, shapes_of, toy_programs, toy_samples

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


ONE = shapes_of((16,), (24,), 4)
"""All rows in one bucket: each costs a compilation."""


@pytest.fixture(scope="module")
def programs():
    return toy_programs(levels=LEVELS)


@pytest.fixture(scope="module")
def split(programs):
    dense = toy_programs(levels=Levels((FULL,), (FULL,)))  # generates with fewer levels to compile
    return build_split(answered(toy_samples(), dense, ONE), ToyPreparer(), programs, ONE, True)


def planner_of(programs, split, folder, budget, compute=ComputeConfig(), objective="teacher_forced", **joint):  # noqa: B008
    joint = JointConfig(budget=str(budget), cost="flops", milestones=0.1, **joint)
    config = RunConfig(
        search=SearchConfig(change="absolute", objective=objective), reduction=REDUCTION, joint=joint, compute=compute
    )
    scoring = TeacherForcing(programs) if objective == "teacher_forced" else Fidelity(programs, objective)
    evaluator = Evaluator(scoring, {"validation": split, "test": split}, Journal.open(folder, {}), 1e9)
    costs = flops_costs(LEVELS, REDUCTION, programs.config.layer_sizes, split.num_tokens)
    return Planner(evaluator, "validation", config, LEVELS, LAYERS, budget, costs)


def test_a_budget_below_the_least_plan_is_refused(programs, split, tmp_path):
    with pytest.raises(UserError, match=r"the plan that computes least has [\d.]+ % of the dense flops; ask for flops="):
        planner_of(programs, split, tmp_path, Budget("flops", 0.01)).check_reachable()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), [("greedy", "teacher_forced"), ("lazy", "agreement"), ("additive", "kl")])
def test_losses_of_the_path_are_those_of_its_plans_and_a_resumed_run_is_equal(programs, split, tmp_path, method, objective):
    budget = Budget("flops", 0.8)
    planner = planner_of(programs, split, tmp_path, budget, method=method, objective=objective)
    path = planner.search(planner.space, "search")
    assert path.points[-1].cost <= 0.8 < path.points[-2].cost
    for point in path.points:
        plan = planner.plan(point.state)
        fresh = planner.evaluator.outcomes("validation", plan, [plan])[0]
        assert point.loss == plan_loss(dataset_metrics(fresh), planner.dense, relative=False)
    planner.evaluator.journal.__exit__(None, None, None)
    again = planner_of(programs, split, tmp_path, budget, method=method, objective=objective)
    done = again.evaluator.journal.num_outcomes
    assert again.search(again.space, "search") == path
    assert again.evaluator.journal.num_outcomes == done
    again.evaluator.journal.__exit__(None, None, None)


def toy_tokens(width, height):
    """The toy's rule: a token has 2 x 2 pixels; odd sizes are impossible."""
    count = width * height // 4 if width % 2 == height % 2 == 0 else 10**9
    return (width * height,), ImageTokens(count, (height, width))


@pytest.mark.slow
def test_a_reached_budget_is_published_beside_its_controls_and_smaller_images(programs, split, tmp_path, monkeypatch):
    planner = planner_of(programs, split, tmp_path, Budget("flops", 0.8), compute=ComputeConfig(max_buckets=1))
    arrays = partial(qwen2_vl.FAMILY.image_arrays, CONFIG)
    kind = Mock(spec=ModelKind, config=CONFIG, image_arrays=arrays, measure=lambda folder, limits: toy_tokens)
    folder = Mock(spec=ModelFolder, kind=kind, path=tmp_path)
    session = Mock(spec=Session, folder=folder, config=planner.config, processes=Processes())
    small = toy_programs(levels=Levels((FULL,), (FULL,)))
    loaded = Mock(spec=LoadedModel, preparer=ToyPreparer(), shapes=ONE, programs=lambda config, levels: small)
    monkeypatch.setattr(plan_run, "SHARES", (0.5, 0.5))
    (half,) = smaller_images(session, loaded, planner.evaluator, "test")  # the second share makes no image smaller still
    states = [planner.space.start]
    for layer in (3, 2, 1):
        states.append(states[-1].moved(Move(layer, "attention", 2), Move(layer, "ffn", 2)))
    path = Path(tuple(PathPoint(state, planner.costs.share(state), 0.1) for state in states), ())
    timed = {}

    def time_plans(programs, batch, plans, repeats, baseline, batches):
        timed.update({name: (plan, batches.get(name, batch)) for name, plan in plans.items()})
        return {name: PrefillTime((2.0, 2.0), (2.0 - int(name) / 8,) * 2, 8, 4, 1, 1, 1) for name in plans}

    monkeypatch.setattr(frontier, "time_plans", time_plans)
    front = Frontier(planner, planner.evaluator, "test", "model", "data", [half]).front(path)
    assert with_divergence(front, planner.evaluator) is front
    by_kl = with_divergence(replace(front, settings={"search": {"objective": "kl"}}), planner.evaluator)
    assert by_kl.largest_divergence > 1e-4
    assert front_fields(by_kl).keys() - front_fields(front).keys() == {"largest_divergence"}
    planner.evaluator.journal.__exit__(None, None, None)
    assert [point.kind for point in front.points] == ["dense", "joint", "joint", "position", "random", "down-sampled"]
    published, controls, shrunk = front.points[front.published], front.points[3:5], front.points[5]
    assert front.published == 2 and published.cost == path.points[-1].cost
    assert all(published.cost - 0.15 < control.cost <= published.cost for control in controls)
    # FLOPs are counted by another function than the one that the search predicts with.
    assert [point.flops for point in front.points[:5]] == pytest.approx([point.cost for point in front.points[:5]], abs=0.02)
    tokens, reduction = split.num_tokens, planner.config.reduction
    sizes, dense = programs.config.layer_sizes, front.points[0].plan

    def cost(text, visual):
        return prefill_cost(sizes, text, [visual] * LAYERS, dense, reduction, with_probes=True)

    few = half.split.num_visual.tolist()
    shares = [cost(text, now) / cost(text, before) for (text, before), now in zip(tokens, few, strict=True)]
    assert shrunk.flops == pytest.approx(np.mean(shares), abs=0.03)
    # Dense, the published plan, its controls and the smaller images are timed; the images in a batch of the same samples.
    whole = split.batches[0]
    assert [(int(name), batch) for name, (_, batch) in timed.items()] == [
        *((place, whole) for place in (0, 2, 3, 4)),
        (5, half.timed),
    ]
    assert [point.time is None for point in front.points] == [False, True, False, False, False, False]
    assert half.timed.inputs.layout.num_visual.sum() == half.split.num_visual[whole.members].sum()
    assert front.points[3].time.reduced == (2 - 3 / 8,) * 2
    # Dense is the slowest and the best, the smaller images are the fastest: neither is dominated.
    assert front.points[0].score.value > max(point.score.value for point in front.points[1:])
    assert front.points[0].on_front and shrunk.on_front
    # What the smaller images score is what samples score that come with smaller images.
    images = [tuple(png(*down_sampled(0.5, toy_tokens, load(image)).size[::-1]) for image in s.images) for s in split.samples]
    given = [replace(sample, images=mine) for sample, mine in zip(split.samples, images, strict=True)]
    expected = build_split(given, ToyPreparer(), small, ONE, True)
    assert few == expected.num_visual.tolist() and sum(few) < 0.7 * split.num_visual.sum()
    assert shrunk.visual_tokens == expected.num_visual.mean() < published.visual_tokens == split.num_visual.mean()
    with Journal.open(tmp_path / "fresh", {}) as journal:
        right = Evaluator(TeacherForcing(small), {"given": expected}, journal, 1e9).outcomes("given", Plan(), [Plan()])[0]
    assert shrunk.score.value == np.mean([values.mean() for values in right.values()]) != front.points[0].score.value


def load(image):
    return load_image(image, "image", "white", upright=True)


@pytest.mark.parametrize(("share", "tokens"), [(1.0, 256), (0.75, 162), (0.5, 126), (0.2, 48), (0.1, 40)])
def test_an_image_is_made_as_small_as_a_share_of_its_tokens_needs(share, tokens):
    def measure(width, height):
        """8 x 8 pixels a token, at least 40 tokens."""
        return (0,), ImageTokens(max(40, round(width / 8) * round(height / 8)))

    image = Image.effect_noise((512, 32), 50)
    smaller = down_sampled(share, measure, image)
    count = measure(*smaller.size)[1].count
    assert count == tokens
    assert smaller.size[0] / smaller.size[1] <= 16
    if share == 1:
        assert smaller is image
    fixed = down_sampled(share, lambda width, height: ((0,), ImageTokens(576)), image)
    assert fixed is image


def losses_with(*bounds):
    return [HeldOutLoss(0.0, bound) for bound in bounds]


@pytest.mark.parametrize(
    ("budget", "images", "bounds", "number", "says"),
    [
        (Budget("loss", 0.01), 400, (), 0, "no move saves cost within the budget, so the dense model is published"),
        (Budget("loss", 0.01), 298, (0.0,), 0, "have 298 images, too few to confirm a loss of 1.00 % with 95% confidence, which"),
        (
            Budget("loss", 0.01),
            299,
            (0.01, 0.011, 0.0),
            1,
            "milestone 1 of 3 loses 0.00 % held out, at most 1.00 % with 95% conf",
        ),
        (Budget("loss", 0.01), 299, (0.02, 0.0), 0, "the first of 2 milestones loses 0.00 % held out, but perhaps 2.00 %, more"),
        (
            Budget("flops", 0.6),
            5,
            (0.2, 0.3),
            2,
            "the path reaches the budget; its held-out loss is 0.00 %, at most 30.00 % with",
        ),
    ],
)
def test_what_is_published(budget, images, bounds, number, says):
    evaluator = Mock(spec=Evaluator, splits={"test": Mock(spec=Split, image_groups=np.repeat(np.arange(images), 2))})
    frontier = Frontier(Mock(spec=Planner, budget=budget), evaluator, "test", "model", "data")
    published, verdict = frontier._published(losses_with(0.0, *bounds), bounds)
    assert published == number
    assert says in verdict


@pytest.mark.parametrize(
    ("budget", "bounds", "tested"),
    [
        (Budget("loss", 0.01), (0.0, 0.01, 0.02, 0.0, 0.0), [0, 1, 2, 3, 5]),
        (Budget("loss", 0.01), (0.02, 0.0), [0, 1, 2]),
        (Budget("loss", 0.01), (0.0, 0.0), [0, 1, 2]),
        (Budget("loss", 0.01), (), [0]),
        (Budget("flops", 0.6), (0.2, 0.3, 0.4), [0, 1, 2, 3]),
    ],
)
def test_milestones_after_the_first_failure_are_left_out_but_the_last(monkeypatch, budget, bounds, tested):
    rivals = [Rival("joint", Plan((layer,)), 1.0) for layer in range(len(bounds) + 1)]
    evaluated = []

    def chain(split, plans, progress):
        evaluated.extend(plans)
        return [{} for _ in plans]

    def losses(self, pair, outcomes):
        assert all(each in outcomes for each in pair)
        return losses_with(0.0, bounds[rivals.index(pair[1]) - 1])

    monkeypatch.setattr(Frontier, "_losses", losses)
    evaluator = Mock(spec=Evaluator, chain=chain)
    frontier = Frontier(Mock(spec=Planner, budget=budget, num_layers=9), evaluator, "test", "model", "data")
    found, outcomes = frontier._confirmed(rivals[0], rivals[1:])
    assert found == list(outcomes) == [rivals[number] for number in tested]
    assert sorted(evaluated, key=lambda plan: plan.attention) == [rivals[number].plan for number in tested]


def test_a_loss_relative_to_a_score_of_0_is_refused_before_the_search():
    images = {"right": np.zeros(3, int), "wrong": np.zeros(3, int)}
    evaluator = Mock(spec=Evaluator, splits={"test": Mock(spec=Split, images=images)})
    evaluator.chain = lambda split, plans, progress: [{"right": np.ones(3), "wrong": np.zeros(3)} for _ in plans]
    space = Space(2, {"attention": 1, "ffn": 1})
    for change in ("relative", "absolute"):
        config = RunConfig(search=SearchConfig(change=change))
        planner = Mock(spec=Planner, config=config, space=space, plan=lambda state: Plan(), num_layers=2)
        frontier = Frontier(planner, evaluator, "test", "model", "data")
        if change == "absolute":
            frontier.check_defined()
        else:
            with pytest.raises(UserError, match=r"dataset wrong: the dense model scores 0, .* set search.change to absolute"):
                frontier.check_defined()


def test_a_time_table_has_the_levels_of_attention_as_rows(programs, monkeypatch):
    """Which program is in which place; no layer is run."""
    split = build_split(toy_samples(), ToyPreparer(), programs, SHAPES, False)

    def layers(programs, batch, attention, ffn):
        return LEVELS.attention.index(attention), LEVELS.ffn.index(ffn)

    asked = []

    def turns(calls, repeats):
        *pairs, whole = calls
        assert whole.func == Plan()
        asked.append(repeats)
        if repeats == 1:
            walls = [(level_times.SECONDS / 70,) for _ in calls]
        else:
            walls = [(10.0 * a + f + 8, 99.0, 10.0 * a + f) for a, f in pairs] + [(53.0, 51.0, 60.0)]
        return [tuple(Turn(wall, 0.0) for wall in each) for each in walls]

    monkeypatch.setattr(level_times, "_layers", layers)
    monkeypatch.setattr(level_times, "static_prefill", lambda programs, plan: plan)
    monkeypatch.setattr(level_times, "warm_up", lambda calls, advance: None)
    monkeypatch.setattr(level_times, "time_turns", turns)
    monkeypatch.setattr(level_times, "partial", lambda *call: SimpleNamespace(func=call[0]))
    times = level_times.time_levels(programs, split.pools, LEVELS, Plan(), 3)
    assert asked == [1, 7] * len(split.pools)  # ten programs a turn
    assert [(each.text_slots, each.visual_slots) for each in times.buckets] == [pool.bucket.size for pool in split.pools]
    assert sum(each.share for each in times.buckets) == pytest.approx(1.0)
    for each, pool in zip(times.buckets, split.pools, strict=True):
        assert each.layer == ((0.0, 0.5, 1.0), (5.0, 5.5, 6.0), (10.0, 10.5, 11.0))  # of one of the two layers that are timed
        assert (each.prefill, each.rows) == (51.0, pool.block_rows)


def test_a_state_is_a_plan_and_back(programs, split, tmp_path):
    planner = planner_of(programs, split, tmp_path, Budget("flops", 0.8))
    state = State((0, 1, 2, 0, 2), (2, 0, 1, 0, 2))
    plan = planner.plan(state)
    assert plan == Plan.of({1: STANDARD, 2: SKIP, 4: SKIP}, {0: SKIP, 2: STANDARD, 4: SKIP})
    assert planner.share(plan) == planner.costs.share(state)
    assert planner.share(Plan.of({1: 7}, {})) is None
    assert np.isclose(planner.share(Plan()), 1.0)
    planner.evaluator.journal.__exit__(None, None, None)
