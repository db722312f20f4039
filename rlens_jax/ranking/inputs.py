"""From samples to batches on the device: the vision tower runs once per image, ever, since no plan can change its output.

Axis letters: B batch, P visual slots, T packed slots, D width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlens_jax.data.samples import Sample, load_image
from rlens_jax.errors import UserError
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import Prompt, PromptBatch, collate
from rlens_jax.ranking.programs import Programs


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
    preparer: Any,
    programs: Programs,
    shapes: Shapes,
    with_answers: bool,
    advance: Callable[[], None],
) -> tuple[Dataset, ...]:
    """Prepare, encode and batch all samples of a split, dataset by dataset in order of first appearance.

    Args:
        samples: the split.
        preparer: the model family's `Preparer`.
        programs: the compiled programs of the run.
        shapes: static shapes.
        with_answers: teacher forcing: one row a reference answer; else one bare prompt a sample.
        advance: called after each prepared sample.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    prepared, grids = [], []
    for sample in samples:
        images = [preparer.image(load_image(source, sample.id), sample.id) for source in sample.images]
        prepared.append([image for image, _ in images])
        grids.append([grid for _, grid in images])
        advance()
    visual = _encode_all(prepared, programs, shapes.batch_size)
    rows = [
        _Row(i, preparer.prompt(sample, grids[i], answer))
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


def _encode_all(prepared: Sequence[Sequence[Any]], programs: Programs, batch_size: int) -> list[np.ndarray]:
    """Visual tokens of each sample, [P_i, D], all its images in order; images of one bucket are encoded together."""
    encoded: list[list[Any]] = [[None] * len(images) for images in prepared]
    by_shape: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for i, images in enumerate(prepared):
        for j, image in enumerate(images):
            by_shape[tuple(array.shape for array in image.arrays)].append((i, j))
    for places in by_shape.values():
        for chunk in _chunks(places, batch_size):
            images = [prepared[i][j] for i, j in _filled(chunk, batch_size)]
            stacked = [np.stack(arrays) for arrays in zip(*(image.arrays for image in images), strict=True)]
            tokens = np.asarray(programs.encode(*stacked))
            for (i, j), rows in zip(
                chunk, tokens, strict=False
            ):  # the rows after the chunk only fill the batch
                encoded[i][j] = rows[: prepared[i][j].num_tokens]
    return [np.concatenate(images) for images in encoded]


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
