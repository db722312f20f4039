"""Runs an evaluation: answer all questions, write predictions, score, count costs, measure times.

Questions are answered in windows, so that only the images of one window are in memory. The batches of a window depend on its
questions alone, and a batch is computed completely or not at all. So a resumed evaluation computes the same batches, in the same
shapes, as one that was never interrupted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rlens_jax.console import Progress, say
from rlens_jax.engine.batches import FILLER
from rlens_jax.engine.choices import automatic_dtype
from rlens_jax.engine.deployed_model import DeployedModel, load
from rlens_jax.engine.inputs import Batch, Split
from rlens_jax.engine.session import ModelFolder
from rlens_jax.engine.startup import start_jax
from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.evaluation.answers import Answers, LoggedAnswer, write_predictions
from rlens_jax.evaluation.datasets import Dataset, load_datasets
from rlens_jax.evaluation.evaluation import (
    Cost,
    DatasetResult,
    Evaluation,
    EvaluationConfig,
    Times,
    VariantResult,
    VariantTime,
    evaluation_json,
    timing_json,
)
from rlens_jax.files import replace_file
from rlens_jax.flops import prefill_cost, visual_in_layer
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.plan_file import PlanFile
from rlens_jax.resources import cache_folder, versions
from rlens_jax.search.bootstrap import difference_interval, score_interval

WINDOW_BATCHES = 8
"""Batches per window: enough questions that batches of several shapes fill up."""

TIMED_TOKENS = 32
"""New tokens in the timed decoding, even if the answers end earlier."""


def evaluate(config: EvaluationConfig) -> Evaluation:
    """Answer, score, time, and write all results to `config.output`.

    Answers in the folder's log, from an earlier run of the same configuration, are not computed again.

    Raises:
        UserError: bad input of any kind; among them a folder that belongs to another model, plan or data.
    """
    start_jax()
    config = dataclasses.replace(config, dtype=config.dtype or automatic_dtype(jax.default_backend()))
    # Checks that need no weights come first.
    folder = ModelFolder.find(config.model)
    config.plan.validate(folder.kind.config.decoder.num_layers)
    datasets = load_datasets(config.data, cache_folder() / "data", kind=folder.kind, limit=config.limit, md5=config.md5)
    questions = {dataset.name: f"{dataset.digest}, {len(dataset.indices)} questions" for dataset in datasets}
    identity = folder.identity({"data": questions, **config.settings()})
    with Answers.open(config.output, identity, restart=config.restart) as answers:
        if answers.repaired:
            say(answers.repaired)
        model = load(
            folder.path,
            dtype=config.dtype,
            batch_size=config.batch_size,
            chunk=config.chunk,
            model_shards=config.model_shards,
            seed=config.seed,
        )
        for dataset in datasets:
            _answer(config, model, dataset, answers)
        for dataset in datasets:
            for variant in config.variants:
                texts = [answer.text for answer in answers.of(variant, dataset)]
                write_predictions(config.output / variant / f"{dataset.name}.tsv", dataset, texts)
        times = _times(config, model, datasets[0]) if config.timing_repeats else None
        decoder = folder.kind.config.decoder
        evaluation = Evaluation(
            config=config,
            model_hash=folder.weights_hash,
            model_type=folder.kind.model_type,
            num_layers=decoder.num_layers,
            device=jax.devices()[0].device_kind,
            versions=versions(),
            datasets={dataset.name: _result(config, decoder, dataset, answers) for dataset in datasets},
            times=times,
        )
        if times is not None:
            replace_file(config.output / "timing.json", timing_json(times).encode())
        # Written last: its presence means that the evaluation is complete.
        replace_file(config.output / "evaluation.json", evaluation_json(evaluation).encode())
    return evaluation


def _answer(config: EvaluationConfig, model: DeployedModel, dataset: Dataset, answers: Answers) -> None:
    """Answer the questions whose answers are not in the log."""
    variants = config.variants

    def known(place: int, variant: str) -> bool:
        return (variant, dataset.name, dataset.indices[place]) in answers

    places = range(len(dataset.indices))
    with Progress(f"answering {dataset.name}", len(places) * len(variants), "answers") as shown:
        shown.advance(sum(known(place, variant) for place in places for variant in variants), resumed=True)
        size = WINDOW_BATCHES * config.batch_size * model.programs.groups
        for window in (places[start : start + size] for start in range(0, len(places), size)):
            missing = [variant for variant in variants if not all(known(place, variant) for place in window)]
            if not missing:
                continue
            split = model.prepare([dataset.sample(place) for place in window], config.max_new_tokens)
            for batch in split.batches:
                members = [window[number] for number in _members(batch)]
                for variant in missing:
                    if all(known(place, variant) for place in members):
                        continue
                    new = []
                    for number, answer in model.answer_batch(split, batch, variants[variant], config.max_new_tokens).items():
                        if not known(window[number], variant):
                            key = (variant, dataset.name, dataset.indices[window[number]])
                            prompt = (int(split.num_text[number]), int(split.num_visual[number]))
                            new.append(LoggedAnswer(*key, answer.text, answer.num_tokens, answer.ended, prompt))
                    answers.append(new)
                    shown.advance(len(members))


def _members(batch: Batch) -> list[int]:
    """Numbers of the samples in a batch."""
    numbers = np.asarray(batch.inputs.layout.sample)
    return numbers[numbers != FILLER].tolist()


def _result(config: EvaluationConfig, decoder: DecoderConfig, dataset: Dataset, answers: Answers) -> DatasetResult:
    variants, scores = {}, {}
    for variant in config.variants:
        logged = answers.of(variant, dataset)
        score = dataset.score([answer.text for answer in logged]) if dataset.scored else None
        interval = None
        if score is not None:
            scores[variant] = score
            interval = score_interval(score, samples=config.bootstrap_samples, seed=config.seed)
        variants[variant] = VariantResult(score, interval, sum(not answer.ended for answer in logged))
    difference = None
    if len(scores) == 2:
        draws = {"samples": config.bootstrap_samples, "seed": config.seed}
        difference = difference_interval(scores["plan"], scores["dense"], **draws)
    prompts = [answer.prompt for answer in answers.of("plan", dataset)]
    return DatasetResult(
        digest=dataset.digest,
        questions=len(prompts),
        text_tokens=float(np.mean([text for text, _ in prompts])),
        visual_tokens=float(np.mean([visual for _, visual in prompts])),
        cost=_cost(config, decoder, prompts),
        variants=variants,
        difference=difference,
    )


def _cost(config: EvaluationConfig, decoder: DecoderConfig, prompts: Sequence[tuple[int, int]]) -> Cost:
    """Mean cost over the prompts, without padding; the shares saved are means of each prompt's share."""
    sizes = decoder.layer_sizes

    def cost(reduced: PlanFile, with_probes: bool) -> np.ndarray:
        costs = []
        for text, visual in prompts:
            in_layer = visual_in_layer(reduced.pruning, visual, decoder.num_layers)
            costs.append(prefill_cost(sizes, text, in_layer, reduced.plan, reduced.reduction, with_probes=with_probes))
        return np.array(costs, float)

    dense, without_probes, with_probes = cost(PlanFile(), False), cost(config.plan, False), cost(config.plan, True)
    return Cost(
        dense=float(dense.mean()),
        reduced=float(without_probes.mean()),
        reduced_with_probes=float(with_probes.mean()),
        saved=float((1 - without_probes / dense).mean()),
        saved_with_probes=float((1 - with_probes / dense).mean()),
    )


def _times(config: EvaluationConfig, model: DeployedModel, dataset: Dataset) -> Times:
    """Times of both variants on the fullest batch of the first questions of a dataset."""
    count = min(config.batch_size * model.programs.groups, len(dataset.indices))
    say(f"timing {count} prompts of {dataset.name}")
    split = model.prepare([dataset.sample(place) for place in range(count)], TIMED_TOKENS)
    batch = max(split.batches, key=lambda batch: len(_members(batch)))
    measured = time_side_by_side(_timed_calls(model, split, batch, (PlanFile(), config.plan)), config.timing_repeats)
    bucket, rows = batch.inputs.layout.bucket, len(batch.inputs.layout.sample)
    return Times(
        rows=rows,
        prompts=len(_members(batch)),
        text_slots=bucket.text,
        visual_slots=bucket.visual,
        dense=VariantTime(*measured[0::2]),
        plan=VariantTime(*measured[1::2]),
        decode_steps=TIMED_TOKENS - 1,
    )


def _timed_calls(model: DeployedModel, split: Split, batch: Batch, plans: tuple[PlanFile, PlanFile]) -> list[Callable[[], Any]]:
    """Prefill, time to the first token, and decoding; each under the dense plan and then under the other."""
    samples = [split.samples[number] for number in _members(batch)]
    visual = model.programs.put(batch.visual)

    def prefill(plan: PlanFile) -> Any:
        return model.programs.prefill(visual, batch.inputs, plan, TIMED_TOKENS)

    def first_token(plan: PlanFile) -> Any:
        prepared = model.prepare(samples, TIMED_TOKENS)
        return [
            model.programs.prefill(model.programs.put(part.visual), part.inputs, plan, TIMED_TOKENS).first
            for part in prepared.batches
        ]

    def decode(prefilled: Any) -> Any:
        return model.programs.decode(prefilled, batch.inputs, TIMED_TOKENS, to_the_end=True)

    prefilled = [jax.block_until_ready(prefill(plan)) for plan in plans]
    return [
        *(partial(prefill, plan) for plan in plans),
        *(partial(first_token, plan) for plan in plans),
        *(partial(decode, states) for states in prefilled),
    ]
