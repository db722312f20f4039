"""Runs an evaluation: answer all questions, write predictions, score, count costs, measure times."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Any

import jax
import numpy as np

from rlens_jax.console import say
from rlens_jax.data.samples import Sample
from rlens_jax.engine.choices import chosen_dtype, dtype_line
from rlens_jax.engine.deployed_model import DeployedModel, load
from rlens_jax.engine.session import ModelFolder
from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError
from rlens_jax.evaluation.answering import Questions, answer_questions
from rlens_jax.evaluation.answers import Answers, LoggedAnswer, write_predictions
from rlens_jax.evaluation.datasets import Dataset, load_datasets
from rlens_jax.evaluation.evaluation import (
    NEW_TOKENS,
    Cost,
    DatasetResult,
    Evaluation,
    EvaluationConfig,
    ImageReading,
    SharedCost,
    Times,
    VariantResult,
    evaluation_fields,
    timing_fields,
)
from rlens_jax.evaluation.profiles import Manner
from rlens_jax.evaluation.timed import measure_times, timed_pair
from rlens_jax.families.generation_config import read_generation_config
from rlens_jax.files import json_text, replace_file
from rlens_jax.flops import TowerAttention, prefill_cost, selection_cost, shared_prefill_cost, visual_in_layer
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.prompt import Preparer
from rlens_jax.plan_file import PlanFile
from rlens_jax.reporting.evaluation_report import evaluation_page
from rlens_jax.resources import cache_folder, versions
from rlens_jax.search.bootstrap import difference_interval, score_interval


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
    questions = list(starmap(Questions.of, prepared_datasets(config, folder)))
    # Each answer names its question, so the log is not bound to the data.
    with Answers.open(config.output, answers_identity(folder, config.settings()), restart=config.restart) as answers:
        if answers.repaired:
            say(answers.repaired)
        model = loaded(config, folder, config.plan)
        say(f"settings for {config.model}: {dtype_line(given, config.dtype)}")
        answer_questions(config.asking, model, questions, answers)
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
            not_applied=model.generation.not_applied,
        )
        fields, timing = evaluation_fields(evaluation), None
        if times is not None:
            timing = timing_fields(times)
            replace_file(config.output / "timing.json", json_text(timing).encode())
        replace_file(config.output / "report.html", evaluation_page(fields, timing).encode())
        # Written last: its presence means that the evaluation is complete.
        replace_file(config.output / "evaluation.json", json_text(fields).encode())
    return evaluation


def prepared_datasets(config: EvaluationConfig, folder: ModelFolder) -> list[tuple[Dataset, Manner, Preparer]]:
    """The datasets to score the model of a folder on, how each is asked, and what prepares its images and prompts.

    Raises:
        UserError: a dataset cannot be read, its questions have no score, or the profile or a limit is not for this model.
    """
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
    generation, kind = read_generation_config(folder.path), folder.kind
    entries = [config.entry(kind.model_type, dataset.name) for dataset in datasets]
    manners = [
        Manner(generation.decoding(NEW_TOKENS, entry.max_new_tokens, entry.repetition_penalty), entry) for entry in entries
    ]
    preparers = [kind.preparer(folder.path, entry.limits) for entry in entries]
    return list(zip(datasets, manners, preparers, strict=True))


def answers_identity(folder: ModelFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a log of answers belongs to: the model, these settings of a run, and what the checkpoint says of decoding."""
    own = read_generation_config(folder.path).decoding(NEW_TOKENS)
    return folder.identity({**settings, "checkpoint": dataclasses.asdict(own)})


def loaded(config: EvaluationConfig, folder: ModelFolder, plan: PlanFile | None = None) -> DeployedModel:
    """The model of a folder, to run mostly under `plan`. UserError if it is not usable."""
    return load(
        folder.path,
        dtype=config.dtype,
        batch_size=config.batch_size,
        chunk=config.chunk,
        model_shards=config.model_shards,
        seed=config.seed,
        plan=plan,
    )


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
        manner=questions.manner,
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


def timed_samples(batch_size: int, model: DeployedModel, questions: Questions) -> list[Sample]:
    """The first questions of a dataset, as many as fill a batch."""
    count = batch_size * model.programs.groups
    usable = [place for window in questions.windows(count) for place in window if place not in questions.unusable]
    return [questions.sample(place) for place in usable[:count]]


def _times(config: EvaluationConfig, model: DeployedModel, questions: Questions) -> Times:
    """Times of both variants on the fullest batch of the first questions of a dataset."""
    samples = timed_samples(config.batch_size, model, questions)
    say(f"timing {len(samples)} prompts of {questions.dataset.name}")
    pair = timed_pair(model.prepared_by(questions.preparer), samples, config.plan, sharing=config.asking.shares)
    return measure_times(*pair, config.timing_repeats)
