"""A ranking run, in one direction.

session (model folder, samples, journal) -> programs -> encoded samples -> ranker (search, curves) -> conclusion -> report

The rankings are written as soon as they are found, before the curves.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax

from rlens_jax.config import RunConfig
from rlens_jax.console import say
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.generating import Generating, generated_texts
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.profile import part, profiled
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.scoring import Scoring, TeacherForcing
from rlens_jax.engine.session import LoadedModel, ModelFolder, Session, encode_splits, load
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.engine.startup import start
from rlens_jax.engine.timing import time_plans
from rlens_jax.flops import mean_saving
from rlens_jax.hosts.processes import Processes, Stopper
from rlens_jax.plan import Operator, Plan
from rlens_jax.ranking.ranker import TEST, VALIDATION, Comparison, Ranker
from rlens_jax.reporting.report_files import is_finished, write_provisional, write_rankings, write_report
from rlens_jax.reporting.report_text import found
from rlens_jax.reporting.run_files import Answer, Example, choose_samples, write_examples
from rlens_jax.resources import versions
from rlens_jax.search.results import PrefillTime, Results, Searched, Timing
from rlens_jax.search.search import Ranking


@dataclass
class Clock:
    """Seconds per phase of a run; a new phase ends the one before."""

    phase: str
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Date and time, ISO 8601."""
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        self.seconds = self.so_far
        self.phase, self.began = phase, time.monotonic()

    @property
    def so_far(self) -> dict[str, float]:
        """Seconds per phase, the current one included."""
        return self.seconds | {self.phase: time.monotonic() - self.began}


def rank(config: RunConfig, processes: Processes | None = None, *, restart: bool = False, profile: bool = False) -> Searched:
    """Rank layers: search, compare on held-out samples, time, and write all results to `config.output`.

    Each ranking is shown and written, marked as provisional, as soon as it is found. The run ends with the rankings if
    `config.report.extent` is `none`; otherwise the value returned is a `Results`.

    Evaluations in the journal of that folder are not made again. `restart` is as of `open_log`. If the run has several
    `processes`, each prepares its share of the samples, all decide alike, and process 0 writes. `profile` also writes
    profile.json; see `rlens_jax.engine.profile`.

    Raises:
        UserError: bad input of any kind.
    """
    processes = processes or Processes()
    clock = Clock("data")
    output, report = Path(config.output), config.report
    compilations = start(config.compute, output, processes)
    processes.check_same(config.portable() | {"output": config.output})
    folder = processes.agreed(lambda: ModelFolder.find(config.model))
    with ExitStack() as opened:
        opened.enter_context(profiled(output if profile and processes.leads else None))
        opened.enter_context(memory_explained(config.compute))
        with part("data"):
            session = opened.enter_context(Session.open(folder, config, processes, restart=restart))
        config = session.config
        clock.enter("load")
        with part("load"):
            loaded = load(session)
        programs = loaded.programs(config)
        scoring = scoring_of(programs, loaded, config)
        clock.enter("encode")
        splits = encode_splits(session, loaded, programs)
        clock.enter("search")
        evaluator = Evaluator(scoring, splits, session.journal, 1e9 * config.compute.state_memory_gb, Stopper().check)
        ranker = Ranker(evaluator, programs.config.num_layers, config)

        def searched(*, provisional: bool) -> Searched:
            timing = conclude_timing(session, clock, compilations.compiled, loaded.shapes.batch_size)
            return conclude_search(session, ranker, rankings, timing, provisional=provisional)

        rankings: dict[Operator, Ranking] = {}
        finished = bool(session.resumed) and processes.leads and is_finished(output)
        for operator in config.search.operators:
            rankings[operator] = ranker.rank(operator, config.search.position_layers)
            say(found(rankings[operator]))
            if processes.leads and not finished:
                write_provisional(searched(provisional=True), output)
        if report.extent == "none":
            clock.enter("report")
            if processes.leads:
                write_rankings(searched(provisional=False), output)
            return searched(provisional=False)
        clock.enter("full search")
        complete = {operator: ranker.rank(operator, 0) for operator in rankings if report.full_search}
        scoring.release()
        clock.enter("held-out curves")
        decoder, tokens = programs.config, splits[TEST].num_tokens
        flops_saved = partial(mean_saving, decoder.layer_sizes, tokens, decoder.num_layers, config.reduction)
        comparison = ranker.compare(rankings, complete, flops_saved)
        clock.enter("timing")
        prefill = time_plans(programs, splits[TEST].batches[0], comparison.plans, report.timing_repeats)
        clock.enter("examples")
        examples = answer_examples(session, loaded, programs, comparison.recommended)
        clock.enter("report")
        results = conclude(searched(provisional=False), ranker, comparison, prefill)
        if processes.leads:
            hashes = {"model_hash": results.model_hash, "data_hash": results.data_hash}
            write_examples(output, examples, plan=comparison.recommended, **hashes)
            write_report(results, output)
    return results


def scoring_of(programs: Programs, loaded: LoadedModel, config: RunConfig) -> Scoring:
    """What decides whether an answer is right, by the objective of the search."""
    if config.search.objective == "teacher_forced":
        return TeacherForcing(programs)
    return Generating(programs, loaded.preparer.chat.decode)


def answer_examples(session: Session, loaded: LoadedModel, programs: Programs, plan: Plan) -> list[Example]:
    """A few held-out samples with the answers that the model generates, dense and under `plan`; on every process."""
    samples = choose_samples(session.splits[TEST].samples)
    split = build_split(samples, loaded.preparer, programs, loaded.shapes, False, processes=session.processes)
    decode = loaded.preparer.chat.decode
    texts = [generated_texts(programs, split, each, decode) for each in (Plan(), plan)]
    return [
        Example.of(sample, loaded.preparer.transparency, *(Answer(text, float(text in sample.answers)) for text in pair))
        for sample, *pair in zip(samples, *texts, strict=True)
    ]


def conclude_timing(session: Session, clock: Clock, compilations: int, batch_size: int) -> Timing:
    """What differs from one run of the same configuration to the next, as far as the run has come."""
    return Timing(
        started=clock.started,
        device=jax.devices()[0].device_kind,
        num_devices=jax.device_count(),
        num_cores=os.cpu_count() or 1,
        seconds=clock.so_far,
        evaluations=session.journal.num_outcomes - session.resumed,
        resumed=session.resumed,
        compilations=compilations,
        batch_size=batch_size,
        prefill={},
    )


def conclude_search(
    session: Session, ranker: Ranker, rankings: Mapping[Operator, Ranking], timing: Timing, *, provisional: bool
) -> Searched:
    """The rankings found so far, with what they depend on."""
    return Searched(
        config=session.config,
        model_hash=session.folder.weights_hash,
        data_hash=session.data_hash,
        num_layers=ranker.num_layers,
        buckets=session.buckets,
        versions=versions(),
        validation_samples=ranker.samples[VALIDATION],
        test_samples=ranker.samples[TEST],
        dense_validation=ranker.metrics(VALIDATION, Plan()),
        rankings=dict(rankings),
        provisional=provisional,
        timing=timing,
    )


def conclude(searched: Searched, ranker: Ranker, comparison: Comparison, prefill: Mapping[str, PrefillTime]) -> Results:
    """The finished run as values."""
    facts = vars(searched) | {"timing": replace(searched.timing, prefill=prefill)}
    dense_test = ranker.metrics(TEST, Plan())
    return Results(**facts, dense_test=dense_test, operators=comparison.operators, combined=comparison.combined)
