"""A ranking run, in one direction.

session (model folder, samples, journal) -> programs -> encoded samples -> ranker (search, curves) -> conclusion -> report

The rankings are written as soon as they are found, before the curves.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from rlens_jax.config import RunConfig
from rlens_jax.console import say
from rlens_jax.engine.compile_ahead import compile_ahead
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import largest_divergences, scoring_of
from rlens_jax.engine.own_answers import own_answers
from rlens_jax.engine.profile import part, profiled
from rlens_jax.engine.session import ModelFolder, Session, encode_split_of, load
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.engine.startup import start
from rlens_jax.engine.timing import time_plans
from rlens_jax.flops import mean_saving
from rlens_jax.hosts.processes import Processes, Stopper
from rlens_jax.planning.plan_run import compared_plan, ranking_levels
from rlens_jax.plans import Operator, Plan
from rlens_jax.ranking.ranker import TEST, VALIDATION, Comparison, Ranker
from rlens_jax.reporting.conclusion import Clock, Conclusion, write_samples
from rlens_jax.reporting.report_files import is_finished, write_provisional, write_rankings, write_report
from rlens_jax.reporting.report_text import found
from rlens_jax.search.expected_work import expected_work
from rlens_jax.search.front import Front, PrefillTime
from rlens_jax.search.results import Results, Searched
from rlens_jax.search.search import Ranking


def rank(config: RunConfig, processes: Processes | None = None, *, restart: bool = False, profile: str | None = None) -> Searched:
    """Rank layers: search, compare on held-out samples, time, and write all results to `config.output`.

    Each ranking is shown and written, marked as provisional, as soon as it is found. The run ends with the rankings if
    `config.report.extent` is `none`; otherwise the value returned is a `Results`.

    Evaluations in the journal of that folder are not made again. `restart` is as of `open_log`. If the run has several
    `processes`, each prepares its share of the samples, all decide alike, and process 0 writes. `profile` writes
    profile.json, too, and is the folder of traces, or "" for none; see `rlens_jax.engine.profile`.

    Raises:
        UserError: bad input of any kind.
    """
    processes, clock = processes or Processes(), Clock("data")
    output, report = config.folder, config.report
    processes.check_same(config.portable() | {"output": config.output})
    folder = processes.agreed(lambda: ModelFolder.find(config.model))
    compilations = start(config.compute, output, processes, folder.path)
    with profiled(output if processes.leads else None, profile), memory_explained(config.compute), ExitStack() as opened:
        with part("data"):
            own = own_answers(folder, config, processes) if config.search.own_answers else {}
            session = opened.enter_context(Session.open(folder, config, processes, restart=restart, own=own))
        config = session.config
        clock.enter("load")
        with part("load"):
            loaded = load(session)
        programs = loaded.programs(config, ranking_levels(session))
        if loaded.mesh.devices.flat[0].platform != "cpu":
            compile_ahead(programs, loaded.shapes, loaded.blocks, forced=config.search.objective != "generation")
        clock.enter("encode")
        splits = {VALIDATION: encode_split_of(session, loaded, programs, VALIDATION)}
        clock.enter("search")
        scoring = scoring_of(programs, loaded, config.search.measure)
        evaluator = Evaluator(scoring, splits, session.journal, 1e9 * config.compute.state_memory_gb, Stopper().check)
        evaluators, num_layers = {VALIDATION: evaluator}, programs.config.num_layers
        ranker = Ranker(evaluators, num_layers, config, expected_work(config, num_layers, session.num_samples))
        conclusion = Conclusion(session, clock, compilations, loaded.shapes.batch_size)
        rankings: dict[Operator, Ranking] = {}
        finished = bool(session.resumed) and processes.leads and is_finished(output)
        for operator in config.search.operators:
            rankings[operator] = ranker.rank(operator, config.search.position_layers)
            say(found(rankings[operator]))
            if processes.leads and not finished:
                write_provisional(conclusion.searched(rankings, ranker.dense, provisional=True), output)
        if report.extent == "none":
            clock.enter("report")
            only_searched = conclusion.searched(rankings, ranker.dense, provisional=False)
            if processes.leads:
                write_rankings(only_searched, output)
            return only_searched
        clock.enter("full search")
        complete = {operator: ranker.rank(operator, 0) for operator in rankings if report.full_search}
        scoring.release()
        clock.enter("encode held-out samples")
        test = encode_split_of(session, loaded, programs, TEST)  # only now: the rankings do not wait for it
        evaluators[TEST] = replace(evaluator, scoring=scoring_of(programs, loaded, config.held_out_measure), splits={TEST: test})
        clock.enter("held-out curves")
        flops_saved = partial(mean_saving, programs.config.layer_sizes, test.num_tokens, num_layers, config.reduction)
        comparison = ranker.compare(rankings, complete, flops_saved)
        clock.enter("timing")
        prefill = time_plans(programs, test.batches[0], comparison.plans, report.timing_repeats)
        front = compared_plan(session, loaded, evaluators, comparison.plans)
        clock.enter("examples")
        write_samples(session, loaded, programs, comparison.recommended, TEST)
        clock.enter("report")
        results = conclude(conclusion.searched(rankings, ranker.dense, provisional=False), ranker, comparison, prefill, front)
        if processes.leads:
            write_report(results, output)
    return results


def conclude(
    searched: Searched, ranker: Ranker, comparison: Comparison, prefill: Mapping[str, PrefillTime], front: Front | None
) -> Results:
    """The finished run as values."""
    evaluators, facts, by_kl = ranker.evaluators, vars(searched.timed(prefill)), searched.config.search.measure == "kl"
    evaluators[TEST].scoring.release()
    divergences = largest_divergences(evaluators[VALIDATION], VALIDATION, comparison.plans) if by_kl else {}
    return Results(**facts, **vars(comparison), dense_test=ranker.metrics(TEST, Plan()), front=front, divergences=divergences)
