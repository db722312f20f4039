"""Runs a comparison: each method answers all questions and is timed in turns with the dense model; then one table.

Answers and measurements are on disk as soon as they are made, so that an interrupted comparison goes on from there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, starmap
from typing import Any

import jax
import numpy as np

from rlens_jax.console import Progress, say
from rlens_jax.data.images import load_images
from rlens_jax.engine.choices import chosen_dtype, dtype_line
from rlens_jax.engine.deployed_model import DeployedModel
from rlens_jax.engine.session import ModelFolder
from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError
from rlens_jax.evaluation.answering import Questions, answer_questions
from rlens_jax.evaluation.answers import Answers
from rlens_jax.evaluation.datasets import Dataset
from rlens_jax.evaluation.evaluation import Asking, EvaluationConfig
from rlens_jax.evaluation.evaluation_run import answers_identity, loaded, prepared_datasets, timed_samples
from rlens_jax.evaluation.measured import Measured, Measurements
from rlens_jax.evaluation.method_table import Answered, Table, check_relative
from rlens_jax.evaluation.methods import ALL, BUDGETS, Method, read_methods
from rlens_jax.evaluation.profiles import Manner
from rlens_jax.evaluation.timed import TIMED_TOKENS, measure_times, timed_pair
from rlens_jax.models.prompt import Grid, Measure
from rlens_jax.reporting.comparison_report import write_comparison
from rlens_jax.resources import versions

COMPARISON_SCHEMA = "rlens-comparison/1"
SEEN_IMAGES = 64
"""First images of each dataset that tell how few visual tokens images can have (our decision)."""


@dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    Attributes:
        asking: model, data, output folder and all other settings, as of an evaluation of the dense model.
        methods: as `evaluation.methods` has them.
        budgets: of the methods that are written without one.
    """

    asking: EvaluationConfig
    methods: tuple[str, ...] = (ALL,)
    budgets: tuple[str, ...] = BUDGETS

    def __post_init__(self) -> None:
        if self.asking.timing_repeats < 1:
            raise UserError(f"--timing-repeats must be at least 1, not {self.asking.timing_repeats}")


def compare(config: CompareConfig) -> dict[str, Any]:
    """Answer, measure, and write all results to the output folder; returns the fields of comparison.json.

    Raises:
        UserError: bad input of any kind; among them a folder that belongs to another model or other settings.
    """
    start_jax()
    given = config.asking.dtype
    asking = replace(config.asking, dtype=chosen_dtype(given, jax.default_backend()))
    # Checks that need no weights come first.
    folder = ModelFolder.find(asking.model)
    prepared = prepared_datasets(asking, folder)
    _check_answers_known(dataset for dataset, *_ in prepared)
    rules = {dataset.name: cache(folder.kind.measure(folder.path, manner.entry.limits)) for dataset, manner, _ in prepared}
    sizes = [(rules[dataset.name], _image_sizes(dataset, manner)) for dataset, manner, _ in prepared]
    methods = read_methods(config.methods, config.budgets, folder, sizes)
    questions = list(starmap(Questions.of, prepared))
    settings = {name: value for name, value in asking.settings().items() if name != "plan"}
    timed = {"data": questions[0].dataset.digest, "timing_repeats": asking.timing_repeats, "timed_tokens": TIMED_TOKENS}
    with (
        Answers.open(asking.output, answers_identity(folder, settings), restart=asking.restart) as answers,
        Measurements.open(asking.output, folder.identity({**settings, **timed}), restart=asking.restart) as measurements,
    ):
        for message in (answers.repaired, measurements.repaired):
            if message:
                say(message)
        model = loaded(asking, folder)
        say(f"settings for {asking.model}: {dtype_line(given, asking.dtype)}")
        run = _Run(asking, model, questions, answers, measurements, rules)
        answered, measured = run.all(methods)
        table = Table(
            methods,
            answered,
            measured,
            {each.dataset.name: each.images for each in questions},
            folder.kind.config.decoder,
            folder.kind.tower_attention,
            model.programs.dtype.itemsize,
            asking.bootstrap_samples,
            asking.seed,
        )
        fields = _fields(config, folder, model, questions, table)
        write_comparison(fields, asking.output)
    return fields


@dataclass
class _Run:
    asking: EvaluationConfig
    model: DeployedModel
    questions: Sequence[Questions]
    answers: Answers
    measurements: Measurements
    rules: Mapping[str, Measure]
    """How the model sizes images, by dataset."""

    def all(self, methods: Sequence[Method]) -> tuple[list[dict[str, Answered]], list[Measured]]:
        """The answers and measurements of all methods; what is in the logs is not made again."""
        answered: list[dict[str, Answered]] = []
        measured: list[Measured] = []
        with Progress("methods", len(methods), "methods") as progress:
            for method in methods:
                known = self.measurements.get(method.key) is not None
                answered.append(self._answered(method))
                if not measured:
                    check_relative({name: each.score for name, each in answered[0].items()})
                measured.append(self._measured(method))
                if method.plan != methods[0].plan:
                    self.model.programs.forget(method.plan)
                progress.advance(resumed=known)
        return answered, measured

    def _answered(self, method: Method) -> dict[str, Answered]:
        variants, batch_size, skip = {method.key: method.plan}, self.asking.batch_size, self.asking.skip_unusable
        for each in self.questions:
            resized = method.resized(self.rules[each.dataset.name])
            asking = Asking(variants, False, batch_size, skip, resized, f", {method.name}")
            answer_questions(asking, self.model, [each], self.answers)
        return {each.dataset.name: self._scored(each, method.key) for each in self.questions}

    def _scored(self, questions: Questions, key: str) -> Answered:
        found = questions.answers(key, self.answers)
        score = questions.dataset.score([None if answer is None else answer.text for answer in found])
        prompts = Counter(answer.prompt for answer in found if answer is not None)
        return Answered(score, prompts, sum(answer is not None and not answer.ended for answer in found))

    def _measured(self, method: Method) -> Measured:
        known = self.measurements.get(method.key)
        if known is not None:
            return known
        first = self.questions[0]
        samples = timed_samples(self.asking.batch_size, self.model, first)
        model, resized = self.model.prepared_by(first.preparer), method.resized(self.rules[first.dataset.name])
        dense, timed = timed_pair(model, samples, method.plan, sharing=False, resized=resized)
        times = measure_times(dense, timed, self.asking.timing_repeats)
        made = Measured(method.key, method.name, times, timed.peak())
        self.measurements.append(made)
        return made


def _check_answers_known(datasets: Iterable[Dataset]) -> None:
    for dataset in datasets:
        if not dataset.scored:
            raise UserError(f"{dataset.name}: its answers are withheld, so it has no score; name data with answers")


def _image_sizes(dataset: Dataset, manner: Manner) -> list[Grid]:
    """Widths and heights of the first images of a dataset as they are asked about, each size once."""

    def sizes() -> Iterator[Grid]:
        for place in range(min(len(dataset.indices), SEEN_IMAGES)):
            with suppress(UserError):  # what becomes of the question is decided when it is asked
                sample = manner.sample(dataset.sample(place), dataset.indices[place])
                yield from (image.size for image in load_images(sample, "dropped"))

    return list(dict.fromkeys(islice(sizes(), SEEN_IMAGES)))


def _fields(
    config: CompareConfig, folder: ModelFolder, model: DeployedModel, questions: Sequence[Questions], table: Table
) -> dict[str, Any]:
    """The fields of comparison.json."""
    asking, times = config.asking, table.measured[0].times
    return {
        "schema": COMPARISON_SCHEMA,
        "model": {
            "path": asking.model,
            "hash": folder.weights_hash,
            "model_type": folder.kind.model_type,
            "num_layers": folder.kind.config.decoder.num_layers,
            "not_applied": list(model.generation.not_applied),
        },
        "device": jax.devices()[0].device_kind,
        "dtype": str(model.programs.dtype),
        "kernel": model.programs.kernel,
        "versions": versions(),
        "datasets": {
            each.dataset.name: {
                "digest": each.dataset.digest,
                "questions": len(each.dataset.indices),
                "unusable": len(each.unusable),
                "images": len(set(each.images)),
                "asked": each.manner.fields(),
            }
            for each in questions
        },
        "prompts": {name: _spread(table.answered[0], place) for place, name in enumerate(("text_tokens", "visual_tokens"))},
        "timed": {
            "prompts": times.prompts,
            "rows": times.rows,
            "text_slots": times.text_slots,
            "visual_slots": times.visual_slots,
            "new_tokens": TIMED_TOKENS,
            "repeats": asking.timing_repeats,
        },
        "methods": table.rows(),
        "configuration": {
            **{name: value for name, value in asking.settings().items() if name not in ("plan", "sharing")},
            "methods": list(config.methods),
            "budgets": list(config.budgets),
            "data": list(asking.data),
            "limit": asking.limit,
            "skip_unusable": asking.skip_unusable,
            "rules": asking.rules,
            "images": asking.images,
            "bootstrap_samples": asking.bootstrap_samples,
        },
    }


def _spread(answered: Mapping[str, Answered], place: int) -> dict[str, float]:
    """Mean, least and most tokens of the dense model's prompts, text (place 0) or visual (1)."""
    counts = [size[place] for each in answered.values() for size in each.prompts.elements()]
    return {"mean": float(np.mean(counts)), "least": min(counts), "most": max(counts)}
