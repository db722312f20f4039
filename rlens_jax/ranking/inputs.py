"""From samples to batches on the device: the vision tower runs once per image, ever, since no plan can change its output.

Axis letters: B batch, P visual slots, T packed slots, D width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL.Image import Image

from rlens_jax.data.samples import Sample, load_image
from rlens_jax.errors import UserError
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import PreparedImage, Prompt, PromptBatch, collate
from rlens_jax.ranking.programs import Programs


@runtime_checkable
class Preparer(Protocol):
    """What a model family does to images and texts before anything is computed."""

    def images(self, pixels: Sequence[Image], sample_id: str) -> Sequence[tuple[PreparedImage, Any]]:
        """All images of a sample, in order: each one's arrays, and what `prompt` must know of it.

        They come together because what a family does to an image may depend on how many there are. Arrays of equal
        shapes make a bucket: they are stacked and go through one program.
        """

    def prompt(self, sample: Sample, images: Sequence[Any], answer: str | None) -> Prompt:
        """The prompt of a sample with what `images` told of its images, and a reference answer if one is given."""


@dataclass(frozen=True)
class Batch:
    """Rows that are evaluated together: one row a (sample, reference answer), or a sample when it is to be generated."""

    inputs: PromptBatch
    visual: Float[Array, "B P D"]
    embedded: Float[Array, "B T D"]
    """States before the first layer."""
    samples: tuple[int, ...]
    """Index into the dataset's samples of each real row; the rows after them fill the static batch size."""


@dataclass(frozen=True)
class Dataset:
    """The batches of one dataset of one split."""

    name: str
    samples: tuple[Sample, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Shapes:
    """Static shapes of a run: bucket sizes, ascending, and rows per batch."""

    text_slots: tuple[int, ...]
    visual_slots: tuple[int, ...]
    batch_size: int

    def bucket(self, prompt: Prompt, sample: Sample) -> Bucket:
        """The smallest bucket that holds the prompt; UserError when none does."""
        sizes = []
        for field, slots, count in (
            ("text_slots", self.text_slots, prompt.num_text),
            ("visual_slots", self.visual_slots, prompt.num_visual),
        ):
            fitting = [n for n in slots if n >= count]
            if not fitting:
                kind = field.split("_")[0]
                raise UserError(
                    f"{sample.id}: {count} {kind} tokens, but the largest bucket has {max(slots)}; "
                    f"add a larger one to compute.{field}"
                )
            sizes.append(min(fitting))
        return Bucket(*sizes)


@dataclass(frozen=True)
class _Row:
    sample: int
    prompt: Prompt


def build_datasets(
    samples: Sequence[Sample],
    preparer: Preparer,
    programs: Programs,
    shapes: Shapes,
    with_answers: bool,
    advance: Callable[[], None],
) -> tuple[Dataset, ...]:
    """Prepare, encode and batch all samples of a split, dataset by dataset in order of first appearance.

    Args:
        samples: the split.
        preparer: of the model's family.
        programs: the compiled programs of the run.
        shapes: static shapes.
        with_answers: teacher forcing: one row a reference answer; else one bare prompt a sample.
        advance: called after each prepared sample.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    encoder, known = _Encoder(programs, shapes.batch_size), []
    for sample in samples:
        images = preparer.images([load_image(source, sample.id) for source in sample.images], sample.id)
        encoder.add([image for image, _ in images])
        known.append([facts for _, facts in images])
        advance()
    visual = encoder.finish()
    rows = [
        _Row(i, preparer.prompt(sample, known[i], answer))
        for i, sample in enumerate(samples)
        for answer in (sample.answers if with_answers else (None,))
    ]
    longest = max(row.prompt.answer_length for row in rows)
    answer_slots = 1 << max(0, longest - 1).bit_length()
    datasets = []
    for name in dict.fromkeys(sample.dataset for sample in samples):
        members = [i for i, sample in enumerate(samples) if sample.dataset == name]
        number = {i: place for place, i in enumerate(members)}
        by_bucket: dict[Bucket, list[_Row]] = defaultdict(list)
        for row in rows:
            if row.sample in number:
                by_bucket[shapes.bucket(row.prompt, samples[row.sample])].append(row)
        batches = [
            _batch(chunk, number, visual, bucket, answer_slots, programs, shapes.batch_size)
            for bucket in sorted(by_bucket, key=lambda b: (b.visual, b.text))
            for chunk in _chunks(by_bucket[bucket], shapes.batch_size)
        ]
        datasets.append(Dataset(name, tuple(samples[i] for i in members), tuple(batches)))
    return tuple(datasets)


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _filled(chunk: Sequence[Any], size: int) -> list[Any]:
    """`chunk` with its first item repeated up to the static size."""
    return [*chunk, *[chunk[0]] * (size - len(chunk))]


class _Encoder:
    """Visual tokens of all samples; a batch is encoded as soon as it is full, since prepared images are large."""

    def __init__(self, programs: Programs, batch_size: int):
        self._programs = programs
        self._batch_size = batch_size
        self._waiting: dict[Any, list[tuple[int, int, PreparedImage]]] = defaultdict(list)
        self._encoded: list[list[Any]] = []

    def add(self, images: Sequence[PreparedImage]) -> None:
        """All images of the next sample."""
        sample = len(self._encoded)
        self._encoded.append([None] * len(images))
        for place, image in enumerate(images):
            waiting = self._waiting[tuple(array.shape for array in image.arrays)]
            waiting.append((sample, place, image))
            if len(waiting) == self._batch_size:
                self._encode(waiting)

    def finish(self) -> list[np.ndarray]:
        """For each sample, [P_i, D]: the tokens of all its images in order."""
        for waiting in self._waiting.values():
            if waiting:
                self._encode(waiting)
        return [np.concatenate(images) for images in self._encoded]

    def _encode(self, waiting: list[tuple[int, int, PreparedImage]]) -> None:
        images = _filled([image for _, _, image in waiting], self._batch_size)
        stacked = [np.stack(arrays) for arrays in zip(*(image.arrays for image in images), strict=True)]
        tokens = np.asarray(self._programs.encode(*stacked))
        # The rows after those that waited only fill the batch.
        for (sample, place, image), rows in zip(waiting, tokens, strict=False):
            self._encoded[sample][place] = rows[: image.num_tokens].copy()
        waiting.clear()


def _batch(
    chunk: Sequence[_Row],
    number: dict[int, int],
    visual: Sequence[np.ndarray],
    bucket: Bucket,
    answer_slots: int,
    programs: Programs,
    batch_size: int,
) -> Batch:
    rows = _filled(chunk, batch_size)
    inputs = collate([row.prompt for row in rows], [row.sample for row in rows], bucket, answer_slots)
    packed = np.zeros((batch_size, bucket.visual, visual[0].shape[1]), visual[0].dtype)
    for place, row in enumerate(rows):
        packed[place, : len(visual[row.sample])] = visual[row.sample]
    inputs = jax.tree.map(jnp.asarray, inputs)
    on_device = jnp.asarray(packed)
    embedded = programs.embed(inputs.text_ids, on_device)
    return Batch(inputs, on_device, embedded, tuple(number[row.sample] for row in chunk))
