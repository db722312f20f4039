"""The sizes of a run's rows and images: of the user's data, read from headers and prompts, or of a table of benchmarks.

A row is a trunk and its branches, grouped as the run groups them. No image is decoded, and nothing is computed with a model.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlens_jax.config import PAGES, RunConfig
from rlens_jax.data.images import image_dimensions
from rlens_jax.data.samples import Sample
from rlens_jax.data.splits import asked_samples, load_splits, with_own
from rlens_jax.engine import trunks
from rlens_jax.engine.buckets import Size
from rlens_jax.engine.dealing import share_trunk
from rlens_jax.engine.preparing import prompts_of
from rlens_jax.engine.trunks import SamplePrompts
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.files import read_json_object
from rlens_jax.mirrors import exists, place
from rlens_jax.models.prompt import ImageSize, ImageTokens, Measure, Preparer
from rlens_jax.resources import benchmark_sizes

TOKENS_PER_WORD = 1.5
TEMPLATE_TOKENS = 20
"""Tokens of a chat template before the image and behind the question (our assumption, where there is no tokenizer)."""
SPREAD = 0.15
"""Images of the table are this much larger or smaller than listed: real ones have many sizes (our assumption)."""
GOLDEN = 0.5 * (math.sqrt(5) - 1)


@dataclass(frozen=True)
class Row:
    """A trunk and its branches."""

    dataset: str
    size: Size
    """Text and visual tokens."""
    images: tuple[ImageSize, ...]
    samples: int
    branches: int
    alone: int
    """Tokens of its prompts if each had a row of its own."""


@dataclass(frozen=True)
class DataSizes:
    """The rows of each split."""

    rows: Mapping[str, tuple[Row, ...]]
    source: str
    """Where they come from."""
    notes: tuple[str, ...]
    """What is assumed about them."""

    @property
    def tokens_alone(self) -> int:
        """Tokens of all prompts if each had a row of its own."""
        return sum(row.alone for rows in self.rows.values() for row in rows)


@dataclass(frozen=True)
class Question:
    """A sample in text tokens."""

    before: int
    """Tokens of the prompt up to the last image."""
    behind: int
    """Tokens of the prompt behind that."""
    answers: tuple[int, ...]
    """Tokens of each answer with the end of the turn; one of 0 if answers are generated."""


def data_sizes(config: RunConfig, kind: ModelKind, folder: Path) -> DataSizes:
    """Sizes of the samples of `data.source`, or of the shipped table of benchmarks if there are none.

    Raises:
        UserError: data that the run would refuse too, as far as their headers and texts tell.
    """
    source = config.data.source
    missing = source is not None and source != PAGES and not exists(place(source))
    lacks_benchmarks = config.data.is_mixture and config.data.benchmarks is None
    if source is not None and not missing and not lacks_benchmarks:
        return _of_samples(config, kind, folder)
    reason = "data.source is open" if source is None else f"{source} {'does not exist' if missing else 'has no data.benchmarks'}"
    limits = {"validation": config.data.validation_samples, "test": config.data.test_samples}
    table = read_json_object(benchmark_sizes())["benchmarks"]
    rows = {
        split: tuple(row for name in table for row in _of_benchmark(name, table[name], kind, folder, most, config))
        for split, most in limits.items()
    }
    notes = (
        f"configs/benchmark_sizes.json says of each of its numbers where it is from. Images are up to {SPREAD:.0%} larger or "
        "smaller than it lists them.",
        f"A chat template has {TEMPLATE_TOKENS} tokens before an image and behind a question, together.",
    )
    return DataSizes(rows, f"configs/benchmark_sizes.json, because {reason}", notes)


def rows_of(dataset: str, visual: int, images: Sequence[ImageSize], questions: Sequence[Question], shared: bool) -> list[Row]:
    """The rows of all questions about the same images, whose prompts begin alike, with `visual` visual tokens, as
    `trunks.rows_of` makes them of prompts.

    The images are those of the first row: they are encoded once.
    """
    if not shared:
        texts = [question.before + question.behind + answer for question in questions for answer in question.answers]
        return [
            Row(dataset, (text, visual), tuple(images) if place == 0 else (), 1, 1, text + visual)
            for place, text in enumerate(texts)
        ]
    tokens = [len(question.answers) * question.behind + sum(question.answers) for question in questions]
    rows: list[Row] = []
    for members in share_trunk(questions[0].before + visual, tokens):
        own = [questions[member] for member in members]
        # A question that is alone in its row belongs to the trunk.
        text = own[0].behind + sum(own[0].answers) if len(own) == 1 else sum(tokens[member] for member in members)
        branches, before = sum(len(question.answers) for question in own), own[0].before
        alone = branches * (before + visual) + sum(tokens[member] for member in members)
        rows.append(Row(dataset, (before + text, visual), () if rows else tuple(images), len(own), branches, alone))
    return rows


def _of_benchmark(
    name: str, entry: Mapping[str, Any], kind: ModelKind, folder: Path, most: int, config: RunConfig
) -> Iterator[Row]:
    """Rows of a benchmark of the table: images first and then all their questions, until there are `most` questions."""
    measure = kind.measure(folder, entry["limits"].get(kind.model_type, {}))
    total, per_image, sizes = min(most, entry["questions"]), entry["questions_per_image"], entry["image_sizes"]
    forced = config.search.objective != "generation"
    answers = [_share(number, entry["answers_per_question"]) for number in range(total)]
    questions = [
        Question(TEMPLATE_TOKENS, entry["question_tokens"], (entry["answer_tokens"] + 1,) * count if forced else (0,))
        for count in answers
    ]
    first = image = 0
    while first < total:
        count = _share(image, per_image)
        scale = 1 + SPREAD * (2 * (image * GOLDEN % 1) - 1)
        width, height = (max(1, round(side * scale)) for side in sizes[image % len(sizes)])
        size, tokens = measure(width, height)
        yield from rows_of(name, tokens.count, (size,), questions[first : first + count], config.compute.sharing)
        first, image = first + count, image + 1


def _share(number: int, mean: float) -> int:
    """The count of one of many whose mean is `mean`: the two whole numbers around it, in turn."""
    return math.floor((number + 1) * mean) - math.floor(number * mean)


def _of_samples(config: RunConfig, kind: ModelKind, folder: Path) -> DataSizes:
    """Rows of the run's own samples; tokens are counted if the folder has a tokenizer, else words."""
    generates = config.search.objective == "generation"
    splits = load_splits(config.data, partial(kind.benchmark_prompt, step_by_step=generates), seed=config.seed)
    asked = asked_samples(splits, config) if config.search.own_answers else {}
    longest = (0,) * config.search.max_new_tokens  # the answers are not known
    splits = with_own(splits, config, {sample.id: longest for members in asked.values() for sample in members})
    measure, source = kind.measure(folder, {}), f"of {config.data.source}"
    try:
        preparer = kind.preparer(folder)
    except UserError as error:
        note = f"A word has {TOKENS_PER_WORD:g} tokens and a chat template {TEMPLATE_TOKENS}, because of {error}."
        rows = {name: tuple(_by_words(samples, measure, generates, config)) for name, samples in splits.items()}
        return DataSizes(rows, source, (note,))
    rows = {name: tuple(_by_tokens(samples, measure, generates, config, preparer)) for name, samples in splits.items()}
    return DataSizes(rows, source, ())


def _by_tokens(
    samples: Sequence[Sample], measure: Measure, generates: bool, config: RunConfig, preparer: Preparer
) -> Iterator[Row]:
    """The rows as the run makes them, but for images that are equal under two names."""
    measured, asked = [_measured(sample, measure) for sample in samples], []
    for number, sample in enumerate(samples):
        prompts = prompts_of(sample, [each for _, each in measured[number]], preparer, not generates)
        asked.append(SamplePrompts(number, sample.images, prompts))
    encoded = set()
    for row in trunks.rows_of(asked, sharing=config.compute.sharing):
        first = row.samples[0]
        images = () if samples[first].images in encoded else tuple(size for size, _ in measured[first])
        encoded.add(samples[first].images)
        size = row.branches.num_text, row.branches.num_visual
        alone = sum(len(prompt.token_ids) for prompt in row.branches.prompts)
        yield Row(samples[first].dataset, size, images, len(set(row.samples)), len(row.samples), alone)


def _by_words(samples: Sequence[Sample], measure: Measure, generates: bool, config: RunConfig) -> Iterator[Row]:
    groups: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.images or sample.id].append(sample)
    for members in groups.values():
        measured = _measured(members[0], measure)
        questions = [
            Question(TEMPLATE_TOKENS, _words(sample.question), (0,) if generates else _answer_lengths(sample))
            for sample in members
        ]
        visual = sum(tokens.count for _, tokens in measured)
        yield from rows_of(members[0].dataset, visual, [size for size, _ in measured], questions, config.compute.sharing)


def _answer_lengths(sample: Sample) -> tuple[int, ...]:
    return tuple(_words(answer) + 1 for answer in sample.answers) if sample.own is None else (len(sample.own),)


def _words(text: str) -> int:
    return math.ceil(TOKENS_PER_WORD * len(text.split()))


def _measured(sample: Sample, measure: Measure) -> list[tuple[ImageSize, ImageTokens]]:
    upright = not sample.as_stored
    return [measure(*image_dimensions(image, f"{sample.id}: image", upright=upright)) for image in sample.images]
