"""The way of an evaluation: model and data -> windows of questions -> answers on disk -> predictions, scores, costs, times.

Questions are answered a window at a time, so that no more than a window's images are ever in memory. The batches of a window
depend on its questions alone, and a batch is computed whole or not at all: an evaluation that was killed and resumed computes
what one that was not would have, in the same shapes.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version

import jax
import numpy as np

from rlens_jax.checkpoints.checkpoint import find_model, model_hash, read_model_kind
from rlens_jax.console import Progress, say
from rlens_jax.deployment.deployed_model import DeployedModel, load
from rlens_jax.engine.inputs import FILLER
from rlens_jax.evaluation.answers import Answers, LoggedAnswer
from rlens_jax.evaluation.datasets import Dataset, load_datasets
from rlens_jax.evaluation.evaluation_config import EvaluationConfig
from rlens_jax.evaluation.evaluation_results import (
    Cost,
    DatasetResult,
    Evaluation,
    VariantResult,
    evaluation_json,
    timing_json,
)
from rlens_jax.evaluation.predictions import write_predictions
from rlens_jax.evaluation.variant_timing import Times, time_variants
from rlens_jax.files import replace_file
from rlens_jax.flops import LayerSizes, prefill_cost, visual_in_layer
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.plan_file import PlanFile
from rlens_jax.resources import cache_folder
from rlens_jax.search.bootstrap import difference_interval, score_interval
from rlens_jax.versions import versions

WINDOW_BATCHES = 8
"""Batches' worth of questions that are prepared together, so that batches of several shapes fill up."""


def evaluate(config: EvaluationConfig) -> Evaluation:
    """Answer, score, time, and write all results to `config.output`.

    What an earlier run of the same configuration answered in that folder is taken from its log.

    Raises:
        UserError: bad input of any kind; among them a folder that belongs to another model, plan or data.
    """
    # What can be known to be wrong without weights or data, first.
    folder = find_model(config.model)
    kind = read_model_kind(folder)
    decoder: DecoderConfig = kind.config.decoder
    config.plan.validate(decoder.num_layers)
    weights = model_hash(folder)
    datasets = load_datasets(
        config.data,
        cache_folder() / "data",
        family=kind.model_type,
        limit=config.limit,
        md5=config.md5,
    )
    device = jax.devices()[0].device_kind
    identity = {
        "model_hash": weights,
        "data": {dataset.name: f"{dataset.digest}, {len(dataset.indices)} questions" for dataset in datasets},
        **config.settings(),
        "device": device,
        "jax": version("jax"),
    }
    with Answers.open(config.output, identity) as answers:
        if answers.repaired:
            say(answers.repaired)
        model = load(
            folder,
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
                write_predictions(
                    config.output / variant / f"{dataset.name}.tsv",
                    dataset,
                    _texts(answers, variant, dataset),
                )
        found = {dataset.name: _result(config, decoder, dataset, answers) for dataset in datasets}
        times = _times(config, model, datasets[0]) if config.timing_repeats else None
        finished = Evaluation(
            config=config,
            model_hash=weights,
            model_type=kind.model_type,
            num_layers=decoder.num_layers,
            device=device,
            versions=versions(),
            datasets=found,
            times=times,
        )
        if times is not None:
            replace_file(config.output / "timing.json", timing_json(times).encode())
        # Last: where it is, the evaluation is done.
        replace_file(config.output / "evaluation.json", evaluation_json(finished).encode())
    return finished


def _answer(config: EvaluationConfig, model: DeployedModel, dataset: Dataset, answers: Answers) -> None:
    """Answer all questions that are not answered yet."""
    variants = config.variants

    def known(place: int, variant: str) -> bool:
        return (variant, dataset.name, dataset.indices[place]) in answers

    places = range(len(dataset.indices))
    with Progress(f"answering {dataset.name}", len(places) * len(variants), "answers") as shown:
        shown.advance(sum(known(place, variant) for place in places for variant in variants), anew=False)
        for window in _windows(len(places), WINDOW_BATCHES * config.batch_size * model.programs.groups):
            missing = [variant for variant in variants if not all(known(place, variant) for place in window)]
            if not missing:
                continue
            split = model.prepare([dataset.sample(place) for place in window], config.max_new_tokens)
            for batch in split.batches:
                numbers = np.asarray(batch.inputs.layout.sample)
                members = [window[number] for number in numbers if number != FILLER]
                for variant in missing:
                    if all(known(place, variant) for place in members):
                        continue
                    said = model.answer_batch(split, batch, variants[variant], config.max_new_tokens)
                    answers.append(
                        [
                            LoggedAnswer(
                                variant,
                                dataset.name,
                                dataset.indices[window[number]],
                                answer.text,
                                answer.num_tokens,
                                answer.ended,
                                (int(split.num_text[number]), int(split.num_visual[number])),
                            )
                            for number, answer in said.items()
                            if not known(window[number], variant)
                        ]
                    )
                    shown.advance(len(members))


def _windows(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _logged(answers: Answers, variant: str, dataset: Dataset) -> list[LoggedAnswer]:
    return [answers[variant, dataset.name, index] for index in dataset.indices]


def _texts(answers: Answers, variant: str, dataset: Dataset) -> list[str]:
    return [answer.text for answer in _logged(answers, variant, dataset)]


def _result(config: EvaluationConfig, decoder: DecoderConfig, dataset: Dataset, answers: Answers) -> DatasetResult:
    variants, scores = {}, {}
    for variant in config.variants:
        logged = _logged(answers, variant, dataset)
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
    prompts = [answer.prompt for answer in _logged(answers, "plan", dataset)]
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
    """Means over the prompts; padding is not counted, and a share saved is the mean of the prompts' shares."""
    sizes = LayerSizes(decoder.width, decoder.num_kv_heads * decoder.head_dim, decoder.ffn_width)

    def cost(given: PlanFile, with_probes: bool) -> np.ndarray:
        costs = [
            prefill_cost(
                sizes,
                text,
                visual_in_layer(given.pruning, visual, decoder.num_layers),
                given.plan,
                given.reduction,
                with_probes=with_probes,
            )
            for text, visual in prompts
        ]
        return np.array(costs, float)

    dense, reduced, with_probes = cost(PlanFile(), False), cost(config.plan, False), cost(config.plan, True)
    return Cost(
        dense=float(dense.mean()),
        reduced=float(reduced.mean()),
        reduced_with_probes=float(with_probes.mean()),
        saved=float((1 - reduced / dense).mean()),
        saved_with_probes=float((1 - with_probes / dense).mean()),
    )


def _times(config: EvaluationConfig, model: DeployedModel, dataset: Dataset) -> Times:
    count = min(config.batch_size * model.programs.groups, len(dataset.indices))
    say(f"timing {count} prompts of {dataset.name}")
    return time_variants(model, [dataset.sample(place) for place in range(count)], config.plan, config.timing_repeats)
