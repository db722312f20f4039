"""The run of `rlens_jax.plan`: the best plan under a budget, searched, confirmed, timed and written.

session -> programs -> encoded samples -> costs of levels -> joint search -> confirmation and comparison -> files
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial

from rlens_jax.budget import parse_budget
from rlens_jax.config import ComputeConfig, Measure, RunConfig
from rlens_jax.console import say
from rlens_jax.data.samples import Sample
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import AnswerAgreement, largest_divergences, scoring_of
from rlens_jax.engine.inputs import Split, encode_split
from rlens_jax.engine.level_times import LEVEL_TIMES, LevelTimes, kept_level_times, time_levels
from rlens_jax.engine.own_answers import own_answers
from rlens_jax.engine.preparing import down_sampled, prepare
from rlens_jax.engine.session import LoadedModel, ModelFolder, Session, encode_split_of, load
from rlens_jax.engine.shapes import blocks_of, choose_shapes, dealt_rows
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.engine.startup import start
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes, Stopper
from rlens_jax.planning.frontier import Frontier, Rival, Smaller, single_operators
from rlens_jax.planning.planner import Planner, flops_costs, time_costs, useful_levels
from rlens_jax.plans import FULL, STANDARD_LEVELS, Levels, Plan
from rlens_jax.reporting.front_report import write_front
from rlens_jax.search.front import Front, Kind

VALIDATION, TEST, CONFIRMATION = "validation", "test", "confirmation"
JOINT = "joint search"
SHARES = (0.75, 0.5, 0.25)
"""Visual tokens of down-sampled images, as shares of those of the images as they are (our decision)."""


def make_plan(config: RunConfig, processes: Processes | None = None, *, restart: bool = False) -> Front:
    """Search the best plan under `config.joint.budget`, confirm it on held-out samples, and write all results.

    Evaluations in the journal of the output folder, and the times in its level_times.json, are not made again.

    Raises:
        UserError: bad input of any kind.
    """
    processes, output = processes or Processes(), config.folder
    if config.search.objective == "generation":
        raise UserError("search.objective must not be generation: the joint search scores answers in one pass")
    processes.check_same(config.portable() | {"output": config.output})
    folder = processes.agreed(lambda: ModelFolder.find(config.model))
    start(config.compute, output, processes, folder.path)
    with memory_explained(config.compute), ExitStack() as opened:
        own = own_answers(folder, config, processes) if config.search.own_answers else {}
        session = opened.enter_context(Session.open(folder, config, processes, restart=restart, own=own))
        config = session.config
        loaded = load(session)
        levels = levels_of(session)
        programs = loaded.programs(config, levels)

        def evaluator(measure: Measure, name: str) -> Evaluator:
            split = encode_split_of(session, loaded, programs, name)
            scoring, memory = scoring_of(programs, loaded, measure), 1e9 * config.compute.state_memory_gb
            return Evaluator(scoring, {name: split}, session.journal, memory, Stopper().check)

        searching = evaluator(config.search.measure, VALIDATION)
        planner = planner_of(session, searching, levels)
        held_out = evaluator(config.held_out_measure, TEST)
        frontier_of(session, planner, held_out, TEST).check_defined()  # before the search, not after hours
        held_out.scoring.release()
        path = planner.search(planner.space, JOINT)
        say(f"{JOINT}: {len(path.points) - 1} moves to {path.points[-1].cost:.1%} of the dense cost")
        rivals = single_operators(planner)
        searching.scoring.release()
        smaller = smaller_images(session, loaded, held_out, TEST)
        front = with_divergence(frontier_of(session, planner, held_out, TEST, smaller).front(path, rivals), searching)
        if processes.leads:
            write_front(front, output)
    return front


def compared_plan(
    session: Session, loaded: LoadedModel, evaluators: Mapping[str, Evaluator], plans: Mapping[str, Plan]
) -> Front | None:
    """The best plan at the end of a ranking run, beside the plans that its rankings recommend; None if it has no budget.

    It is confirmed on samples of its own, if there are any. `rlens_jax.plan` also compares it with smaller images.
    """
    if session.config.joint.budget is None:
        return None
    searching, held_out, name = evaluators[VALIDATION], evaluators[TEST], TEST
    held_out.scoring.release()
    planner = planner_of(session, searching, levels_of(session))
    path = planner.search(planner.space, JOINT)
    searching.scoring.release()
    if CONFIRMATION in session.splits:
        name = CONFIRMATION
        held_out = replace(held_out, splits={name: encode_split_of(session, loaded, searching.scoring.programs, name)})
    kinds: dict[str, Kind] = {"attention": "attention", "ffn": "ffn", "both": "both"}
    rivals = [Rival(kinds[each], plan, planner.share(plan)) for each, plan in plans.items()]
    return with_divergence(frontier_of(session, planner, held_out, name).front(path, rivals), searching)


def levels_of(session: Session) -> Levels:
    """The ladders of the joint search of a run. UserError as of `useful_levels`."""
    sizes = session.folder.kind.config.decoder.layer_sizes
    tokens = [(text, visual) for text, visual in session.splits[VALIDATION].num_tokens.tolist()]
    return useful_levels(session.config, sizes, tokens)


def ranking_levels(session: Session) -> Levels:
    """The levels that the programs of a ranking run compile: those of a joint search only if there is one."""
    return STANDARD_LEVELS if session.config.joint.budget is None else STANDARD_LEVELS.joined(levels_of(session))


def planner_of(session: Session, evaluator: Evaluator, levels: Levels) -> Planner:
    """The joint search of a run; times the levels, if the budget is spent by time.

    UserError if the budget cannot be reached, or nothing can be reduced.
    """
    config, split, programs = session.config, evaluator.splits[VALIDATION], evaluator.scoring.programs
    budget = parse_budget(config.joint.budget or "")
    decoder = programs.config
    length, sizes, tokens = decoder.num_layers, decoder.layer_sizes, split.num_tokens
    planner = Planner(evaluator, VALIDATION, config, levels, length, budget, flops_costs(levels, config.reduction, sizes, tokens))
    if budget.kind != "flops" and not (budget.kind == "loss" and config.joint.cost == "flops"):
        dense = planner.plan(planner.space.start)

        def measure() -> LevelTimes:
            return time_levels(programs, split.pools, levels, dense, config.report.timing_repeats)

        path = config.folder / LEVEL_TIMES
        times = kept_level_times(path, session.folder.weights_hash, levels, session.processes, measure)
        planner = replace(planner, costs=time_costs(times, length))
    planner.check_reachable()
    return planner


def frontier_of(
    session: Session, planner: Planner, evaluator: Evaluator, split: str, smaller: Sequence[Smaller] = ()
) -> Frontier:
    """What confirms and compares on a held-out split."""
    return Frontier(planner, evaluator, split, session.folder.weights_hash, session.data_hash, smaller)


def with_divergence(front: Front, searching: Evaluator) -> Front:
    """The front with the published plan's largest divergence, if plans were scored by KL."""
    if front.settings["search"]["objective"] != "kl":
        return front
    found = largest_divergences(searching, VALIDATION, {"published": front.plan})
    return replace(front, largest_divergence=found["published"])


def smaller_images(session: Session, loaded: LoadedModel, evaluator: Evaluator, name: str) -> list[Smaller]:
    """The samples of a split with images of fewer visual tokens, at each of `SHARES` that leaves fewer than the one before."""
    kind, config, whole = session.folder.kind, session.config, evaluator.splits[name]
    measure = cache(kind.measure(session.folder.path, {}))
    programs = loaded.programs(config, Levels((FULL,), (FULL,)))
    own = config.held_out_measure == "agreement"
    scoring = AnswerAgreement(programs) if own else scoring_of(programs, loaded, config.held_out_measure)
    compute = replace(config.compute, visual_slots=None, patch_slots=None)
    found, least = [], whole.num_visual.sum()

    def encoded(members: Sequence[Sample], share: float, compute: ComputeConfig, rows: int) -> Split:
        resized = partial(down_sampled, share, measure)
        forced = config.search.objective != "generation"
        longest = None if compute.text_slots is None else compute.text_slots[-1]
        ready = partial(prepare, sharing=compute.sharing, most_text=longest, resized=resized)
        prepared = ready(members, loaded.preparer, forced, session.processes)
        shapes = replace(session.processes.agreed(lambda: choose_shapes(compute, kind, [prepared])), batch_size=rows)
        dealt = dealt_rows(prepared, shapes, programs.groups)
        blocks = blocks_of([(prepared, dealt)], shapes, even=True)
        return encode_split(prepared, programs, shapes, dealt, blocks, session.processes)

    for share in SHARES:
        split = encoded(whole.samples, share, compute, loaded.shapes.batch_size)
        if split.num_visual.sum() < least:
            least = split.num_visual.sum()
            timed = [whole.samples[number] for number in whole.batches[0].members]
            batch, *_ = encoded(timed, share, replace(compute, max_buckets=1), len(timed)).batches
            part = f"{name}, at most {share:.0%} of the visual tokens"
            found.append(Smaller(replace(evaluator, scoring=scoring, splits={part: split}), part, batch))
    return found
