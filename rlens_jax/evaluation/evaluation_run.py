"""Runs an evaluation: answer all questions, write predictions, score, count costs, measure times."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rlens_jax.console import say
from rlens_jax.data.samples import Sample
from rlens_jax.engine.choices import chosen_dtype, dtype_line
from rlens_jax.engine.deployed_model import DeployedModel, load
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.session import ModelFolder
from rlens_jax.engine.startup import start_jax
from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.errors import UserError
from rlens_jax.evaluation.answering import Questions, answer_questions
from rlens_jax.evaluation.answers import Answers, LoggedAnswer, write_predictions
from rlens_jax.evaluation.datasets import Dataset, load_datasets
from rlens_jax.evaluation.evaluation import (
    Cost,
    DatasetResult,
    Evaluation,
    EvaluationConfig,
    ImageReading,
    SharedCost,
    Times,
    VariantResult,
    VariantTime,
    evaluation_json,
    timing_json,
)
from rlens_jax.files import replace_file
from rlens_jax.flops import TowerAttention, prefill_cost, selection_cost, shared_prefill_cost, visual_in_layer
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.plan_file import PlanFile
from rlens_jax.resources import cache_folder, versions
from rlens_jax.search.bootstrap import difference_interval, score_interval

TIMED_TOKENS = 32
"""New tokens in the timed decoding, even if the answers end earlier."""


def evaluate(config: EvaluationConfig) -> Evaluation:
    """Answer, score, time, and write all results to `config.output`.

    Answers in the folder's log, from an earlier run of the same configuration, are not computed again.

    Raises:
        UserError: bad input of any kind; among them a folder that belongs to another model, plan or data.
    """
    start_jax()
    given, config = config.dtype, dataclasses.replace(config, dtype=chosen_dtype(config.dtype, jax.default_backend()))
    # Checks that need no weights come first.
    folder = ModelFolder.find(config.model)
    config.plan.validate(folder.kind.config.decoder, folder.kind.model_type)
    folder.kind.check_pruning(config.plan.pruning)
    datasets = load_datasets(
        config.data,
        cache_folder() / "data",
        kind=folder.kind,
        limit=config.limit,
        md5=config.md5,
        rules=config.rules,
        recompress=config.images == "recompressed",
    )
    for dataset in datasets:
        _check_scores(dataset, config.limit)
    questions = [Questions.of(dataset) for dataset in datasets]
    # Each answer names its question, so the log is not bound to the data.
    with Answers.open(config.output, folder.identity(config.settings()), restart=config.restart) as answers:
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
        say(f"settings for {config.model}: {dtype_line(given, config.dtype)}")
        answer_questions(config, model, questions, answers)
        for each in questions:
            for variant in config.variants:
                path = config.output / variant / f"{each.dataset.name}.tsv"
                write_predictions(path, each.dataset, _texts(each, variant, answers))
        times = _times(config, model, questions[0]) if config.timing_repeats else None
        evaluation = Evaluation(
            config=config,
            model_hash=folder.weights_hash,
            model_type=folder.kind.model_type,
            num_layers=folder.kind.config.decoder.num_layers,
            device=jax.devices()[0].device_kind,
            versions=versions(),
            datasets={each.dataset.name: _result(config, model, each, answers) for each in questions},
            times=times,
        )
        if times is not None:
            replace_file(config.output / "timing.json", timing_json(times).encode())
        # Written last: its presence means that the evaluation is complete.
        replace_file(config.output / "evaluation.json", evaluation_json(evaluation).encode())
    return evaluation


def _check_scores(dataset: Dataset, limit: int | None) -> None:
    """Raise UserError, before anything is answered, if the questions of a dataset have no score."""
    if dataset.scored:
        try:
            dataset.score([None] * len(dataset.indices))
        except UserError as error:
            hint = "" if limit is None else f"; --limit {limit} takes the first questions only, leave it out or raise it"
            raise UserError(f"{error}{hint}") from None


def _texts(questions: Questions, variant: str, answers: Answers) -> list[str | None]:
    return [None if answer is None else answer.text for answer in questions.answers(variant, answers)]


def _result(config: EvaluationConfig, model: DeployedModel, questions: Questions, answers: Answers) -> DatasetResult:
    variants, scores, dataset = {}, {}, questions.dataset
    draws = {"samples": config.bootstrap_samples, "seed": config.seed}
    for variant in config.variants:
        score = dataset.score(_texts(questions, variant, answers)) if dataset.scored else None
        interval = None
        if score is not None:
            scores[variant] = score
            interval = score_interval(score, questions.images, **draws)
        unended = sum(answer is not None and not answer.ended for answer in questions.answers(variant, answers))
        variants[variant] = VariantResult(score, interval, unended)
    difference = None
    if len(scores) == 2:
        difference = difference_interval(scores["plan"], scores["dense"], questions.images, **draws)
    answered = [answer for answer in questions.answers("plan", answers) if answer]
    num_layers = model.programs.config.num_layers
    per_layer = [visual_in_layer(config.plan.pruning, answer.prompt[1], num_layers) for answer in answered]
    sample = dataset.sample(0)
    return DatasetResult(
        digest=dataset.digest,
        questions=len(dataset.indices),
        unusable=len(questions.unusable),
        per_image=questions.per_image,
        images=ImageReading(not sample.as_stored, "dropped" if sample.as_stored else model.preparer.transparency),
        text_tokens=float(np.mean([answer.prompt[0] for answer in answered])),
        visual_tokens=float(np.mean([answer.prompt[1] for answer in answered])),
        kept_tokens=float(np.mean([layers[-1] for layers in per_layer])),
        mean_tokens=float(np.mean(per_layer)),
        cost=_cost(config, model.programs.config, model.kind.tower_attention, answered),
        variants=variants,
        difference=difference,
    )


def _cost(
    config: EvaluationConfig, decoder: DecoderConfig, tower: TowerAttention | None, answers: Sequence[LoggedAnswer]
) -> Cost:
    """Mean cost over the prompts, without padding; the shares saved are means of each prompt's share."""
    sizes, num_layers = decoder.layer_sizes, decoder.num_layers

    def cost(reduced: PlanFile, with_probes: bool) -> tuple[np.ndarray, float]:
        """Of each prompt alone; and the mean as computed."""
        alone, shared = [], []
        for answer in answers:
            (text, visual), (trunk_text, sharers) = answer.prompt, answer.row
            given = sizes, text, visual_in_layer(reduced.pruning, visual, num_layers), reduced.plan, reduced.reduction
            alone.append(prefill_cost(*given, with_probes=with_probes))
            shared.append(shared_prefill_cost(*given, trunk_text=trunk_text, sharers=sharers, with_probes=with_probes))
        return np.array(alone, float), float(np.mean(shared))

    (dense, shared_dense), (reduced, shared_reduced) = cost(PlanFile(), False), cost(config.plan, False)
    with_probes, shared_with_probes = cost(config.plan, True)
    selection = [selection_cost(sizes, num_layers, *answer.prompt, config.plan.pruning, tower) for answer in answers]
    return Cost(
        dense=float(dense.mean()),
        reduced=float(reduced.mean()),
        reduced_with_probes=float(with_probes.mean()),
        selection=float(np.mean(selection)),
        saved=float((1 - reduced / dense).mean()),
        saved_with_probes=float((1 - with_probes / dense).mean()),
        shared=SharedCost(shared_dense, shared_reduced, shared_with_probes),
    )


def _times(config: EvaluationConfig, model: DeployedModel, questions: Questions) -> Times:
    """Times of both variants on the fullest batch of the first questions of a dataset."""
    count = config.batch_size * model.programs.groups
    usable = [place for window in questions.windows(count) for place in window if place not in questions.unusable]
    places = usable[:count]
    say(f"timing {len(places)} prompts of {questions.dataset.name}")
    samples = [questions.dataset.sample(place) for place in places]
    prompts = model.prepare(samples, TIMED_TOKENS, sharing=config.shares, marked=config.plan.marked)
    batch = max(prompts.batches, key=lambda batch: len(batch.members))
    members = [samples[number] for number in batch.members]
    calls = _timed_calls(model, members, batch, (PlanFile(), config.plan), config.shares)
    measured = time_side_by_side(calls, config.timing_repeats)
    bucket, (rows, branches) = batch.inputs.layout.bucket, batch.inputs.samples.shape
    return Times(
        rows=rows,
        branches=branches,
        prompts=len(batch.members),
        text_slots=bucket.text,
        visual_slots=bucket.visual,
        dense=VariantTime(*measured[0::2]),
        plan=VariantTime(*measured[1::2]),
        decode_steps=TIMED_TOKENS - 1,
    )


def _timed_calls(
    model: DeployedModel, samples: Sequence[Sample], batch: Batch, plans: tuple[PlanFile, PlanFile], sharing: bool
) -> list[Callable[[], Any]]:
    """Prefill, time to the first token, and decoding of a batch of samples; each under the dense plan and then the other."""
    visual = model.programs.put(batch.visual)

    def prefill(plan: PlanFile) -> Any:
        return model.programs.prefill(visual, batch.inputs, plan, TIMED_TOKENS)

    def first_token(plan: PlanFile) -> Any:
        prepared = model.prepare(samples, TIMED_TOKENS, sharing=sharing, marked=plan.marked)
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
