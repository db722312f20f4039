"""The way of a ranking run, without turning back.

config -> weights -> model; data -> samples -> embeddings -> work items (plan, batch) -> outcomes -> search -> journal -> report.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax

from rlens_jax.config import RunConfig
from rlens_jax.console import Progress
from rlens_jax.data.samples import load_image
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.inputs import Split, build_split, own_samples
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.rounds import metrics_of, num_evaluations, round_scorer
from rlens_jax.engine.scoring import Generating, Scoring, TeacherForcing
from rlens_jax.engine.session import Session, load, start
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.engine.timing import time_plan
from rlens_jax.flops import LayerSizes, saving
from rlens_jax.hosts.processes import Processes, Stopper
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.plan import Operator, Plan
from rlens_jax.ranking.shown_answers import examples_of, generated_answers
from rlens_jax.reporting.examples import MAX_IMAGES, Answer, Example, write_examples
from rlens_jax.reporting.report_files import write_report
from rlens_jax.search.curves import held_out_plans, operator_result, plan_saving
from rlens_jax.search.results import OperatorResult, PrefillTime, Results, Saving, Timing
from rlens_jax.search.search import Ranking, rank_layers
from rlens_jax.versions import versions

VALIDATION, TEST = "validation", "test"


@dataclass
class _Clock:
    """Seconds that each phase of the run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@dataclass
class _Bar:
    """What is told of every finished evaluation: the progress bar, which changes from phase to phase, and the end that
    processes agree on.
    """

    stopper: Stopper
    current: Progress | None = None

    def advance(self, anew: bool) -> None:
        if self.current is not None:
            self.current.advance(anew=anew)
        self.stopper.check()

    @contextmanager
    def show(self, label: str, total: int) -> Iterator[None]:
        with Progress(label, total, "evaluations") as self.current:
            yield
        self.current = None


def run(config: RunConfig, processes: Processes) -> Results:
    """Search, compare on held-out samples, time, and write all results to `config.output`.

    Everything that was finished by an earlier run of the same configuration in that folder is taken from its journal.
    Of several processes each prepares its share of the samples, all decide alike, and the first writes.

    Raises:
        UserError: bad input of any kind.
    """
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), _Clock()
    output, compute = Path(config.output), config.compute
    compilations = start(compute, output, processes)
    processes.check_same(config.portable() | {"output": config.output})
    forced = config.search.objective == "teacher_forced"
    with (
        Session.open(
            config.model,
            output,
            config.data,
            config.deciding_settings(),
            processes,
            seed=config.seed,
            step_by_step=not forced,
        ) as session,
        memory_explained(compute.batch_size, compute.model_shards),
    ):
        journal, kind, splits = session.journal, session.folder.kind, session.splits
        with clock.phase("load"):
            loaded = load(session.folder, compute, config.reduction, config.search)
            programs = Programs(
                loaded.module,
                loaded.mesh,
                config.reduction,
                seed=config.seed,
                new_tokens=config.search.max_new_tokens,
                stop_token=loaded.chat.stop_token,
            )
        decode_text = loaded.chat.decode
        built: dict[str, Split] = {}
        with clock.phase("encode"):
            for name, samples in splits.items():
                own = len(own_samples(len(samples), loaded.mesh))
                with Progress(f"preparing {name}", own, "samples") as shown:
                    built[name] = build_split(
                        samples, loaded.preparer, programs, loaded.shapes, forced, shown.advance, processes
                    )
        scoring: Scoring = TeacherForcing(programs) if forced else Generating(programs, decode_text)
        bar = _Bar(Stopper())
        num_layers = kind.config.decoder.num_layers
        evaluator = Evaluator(
            scoring,
            built,
            journal,
            num_layers=num_layers,
            state_bytes=compute.state_memory_gb * 1e9,
            advance=bar.advance,
        )
        search = _Search(config, num_layers, evaluator, built, bar)
        with clock.phase("search"):
            operators = config.search.operators
            rankings = {operator: search.rank(operator, config.search.position_layers) for operator in operators}
        with clock.phase("full search"):
            compared = operators if config.report.full_search else ()
            complete = {operator: search.rank(operator, 0) for operator in compared}
        scoring.release()
        flops_saved = partial(_flops_saved, config, kind.config.decoder, built[TEST])
        with clock.phase("held-out curves"):
            results, combined = search.compare(rankings, complete, flops_saved)
        named = _recommended(results, combined)
        with clock.phase("timing"):
            prefill = _timed(config, programs, named, built[TEST])
        recommended = named["both" if combined else operators[0]]
        with clock.phase("examples"):
            chosen = examples_of(splits[TEST])
            asked = build_split(chosen, loaded.preparer, programs, loaded.shapes, False, lambda: None, processes)
            answers = [generated_answers(programs, asked, plan, decode_text) for plan in (Plan(), recommended)]
        timing = Timing(
            started=started,
            device=jax.devices()[0].device_kind,
            num_devices=jax.device_count(),
            num_cores=os.cpu_count() or 1,
            seconds=clock.seconds,
            evaluations=len(journal.records()) - session.resumed,
            resumed=session.resumed,
            compilations=compilations.compiled,
            prefill=prefill,
        )
        finished = Results(
            config=config,
            model_hash=session.folder.weights_hash,
            data_hash=session.data_hash,
            num_layers=num_layers,
            versions=versions(),
            validation_samples=_sizes(built[VALIDATION]),
            test_samples=_sizes(built[TEST]),
            dense_validation=search.metrics(VALIDATION, Plan()),
            dense_test=search.metrics(TEST, Plan()),
            operators=results,
            combined=combined,
            timing=timing,
        )
        if processes.leads:
            examples = [
                Example(
                    sample.id,
                    sample.dataset,
                    sample.question,
                    sample.answers,
                    tuple(load_image(image, sample.id) for image in sample.images[:MAX_IMAGES]),
                    *(Answer(text, float(text in sample.answers)) for text in pair),
                )
                for sample, *pair in zip(chosen, *answers, strict=True)
            ]
            write_examples(
                output, examples, plan=recommended, model_hash=session.folder.weights_hash, data_hash=session.data_hash
            )
            write_report(finished, output)
    return finished


class _Search:
    """The questions a run asks its evaluator, and their answers as scores and results."""

    def __init__(
        self,
        config: RunConfig,
        num_layers: int,
        evaluator: Evaluator,
        splits: dict[str, Split],
        bar: _Bar,
    ):
        self._config = config
        self._num_layers = num_layers
        self._evaluator = evaluator
        self._datasets = {name: len(split.datasets) for name, split in splits.items()}
        self._bar = bar
        self._relative = config.search.change == "relative"

    def metrics(self, split: str, plan: Plan) -> dict[str, float]:
        """Each dataset's metric under a plan."""
        (outcomes,) = self._evaluator.outcomes(split, Plan(), [plan])
        return metrics_of(outcomes)

    def rank(self, operator: Operator, position_layers: int | None) -> Ranking:
        """One search on the validation samples."""
        length = self._num_layers
        prior = length // 4 if position_layers is None else position_layers
        evaluations = num_evaluations(length, prior) + 1  # the dense plan is asked for twice
        label = f"ranking {operator}" if position_layers != 0 else f"ranking {operator}, L_p = 0"
        with self._bar.show(label, evaluations * self._datasets[VALIDATION]):
            dense = self.metrics(VALIDATION, Plan())
            score_round = round_scorer(
                self._evaluator,
                VALIDATION,
                dense,
                alpha=self._config.search.penalty,
                relative=self._relative,
            )
            return rank_layers(length, position_layers, operator, score_round, self._config.search.base())

    def compare(
        self,
        rankings: dict[Operator, Ranking],
        complete: dict[Operator, Ranking],
        flops_saved: Callable[[Plan, bool], float],
    ) -> tuple[dict[Operator, OperatorResult], Saving | None]:
        """Held-out curves of every operator, and what both operators' reductions save together."""
        report, seed = self._config.report, self._config.seed
        plans = {
            operator: held_out_plans(ranking, report.random_rankings, seed, complete.get(operator))
            for operator, ranking in rankings.items()
        }
        total = 1 + sum(map(len, plans.values())) + (len(rankings) == 2)
        results: dict[Operator, OperatorResult] = {}
        with self._bar.show("held-out curves", total * self._datasets[TEST]):
            dense = self.metrics(TEST, Plan())
            for operator, ranking in rankings.items():
                outcomes = self._evaluator.outcomes(TEST, Plan(), plans[operator])
                results[operator] = operator_result(
                    ranking,
                    dict(zip(plans[operator], outcomes, strict=True)),
                    dense,
                    flops_saved,
                    num_random=report.random_rankings,
                    seed=seed,
                    search_all=complete.get(operator),
                    bootstrap_samples=report.bootstrap_samples,
                    relative=self._relative,
                )
            combined = None
            if len(results) == 2:
                plan = Plan(results["attention"].saving.plan.attention, results["ffn"].saving.plan.ffn)
                metrics = self.metrics(TEST, plan)
                combined = plan_saving(plan, metrics, dense, flops_saved, relative=self._relative)
        return results, combined


def _flops_saved(config: RunConfig, decoder: DecoderConfig, split: Split, plan: Plan, with_probes: bool) -> float:
    """Share of the dense prefill's multiply-adds that a plan saves, mean over all samples (padding not counted)."""
    sizes = LayerSizes(decoder.width, decoder.num_kv_heads * decoder.head_dim, decoder.ffn_width)
    shares = [
        saving(sizes, text, [visual] * decoder.num_layers, plan, config.reduction, with_probes=with_probes)
        for text, visual in zip(split.num_text.tolist(), split.num_visual.tolist(), strict=True)
    ]
    return sum(shares) / len(shares)


def _recommended(results: dict[Operator, OperatorResult], combined: Saving | None) -> dict[str, Plan]:
    """The plans that the report recommends, by operator, and for "both"."""
    named: dict[str, Plan] = {operator: result.saving.plan for operator, result in results.items()}
    return named if combined is None else named | {"both": combined.plan}


def _timed(
    config: RunConfig,
    programs: Programs,
    named: dict[str, Plan],
    split: Split,
) -> dict[str, PrefillTime]:
    """Measured prefill times of named plans."""
    batch = split.batches[0]
    bucket = batch.inputs.layout.bucket
    times = {}
    for name, plan in named.items():
        dense, reduced = time_plan(programs, batch, plan, repeats=config.report.timing_repeats)
        rows = len(batch.inputs.layout.sample)
        times[name] = PrefillTime(dense, reduced, rows, bucket.text, bucket.visual)
    return times


def _sizes(split: Split) -> dict[str, int]:
    return {name: len(members) for name, members in split.datasets.items()}
