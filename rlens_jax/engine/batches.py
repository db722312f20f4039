"""Batches that all processes fill together: images for the vision tower, and rows of prompts for the decoder."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.schedule import filled_blocks
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import PreparedImage, Prompt, PromptBatch, collate
from rlens_jax.sharding.mesh import groups_of, local_rows
from rlens_jax.sharding.model_axis import WORK

Gather = Callable[[Any], list[Any]]
"""Every process's value, in the order of the processes."""

ENCODED_PATCHES = 16384
"""Max patches that a work group encodes together (our decision): more are not faster, and attention among them takes memory."""


FILLER = -1
"""The sample number of rows that only fill a batch."""


def images_together(batch_size: int, patches: int) -> int:
    """How many images of `patches` patches a work group encodes together."""
    return max(1, min(batch_size, ENCODED_PATCHES // patches))


@dataclass(frozen=True, order=True)
class _ImageBucket:
    """Shapes and dtypes of the arrays of a prepared image; images of one bucket are stacked and encoded together."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def patches(self) -> int:
        """Patches of an image, padding included."""
        return math.prod(self.shapes[0][:-1])

    def stacked(self, images: Sequence[PreparedImage], size: int) -> list[np.ndarray]:
        """The arrays of the images with a leading axis of `size` places; places without an image are 0."""
        arrays = [np.zeros((size, *shape), dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        for place, image in enumerate(images):
            for array, values in zip(arrays, image.arrays, strict=True):
                array[place] = values
        return arrays


class Encoder:
    """Visual tokens of this process's samples. Prepared images are large, so they are encoded as soon as they fill a batch.

    All processes encode together: each gives images to its own work groups, or empty ones if it has none of a bucket left.
    """

    def __init__(self, programs: ModelPrograms, batch_size: int, gather: Gather):
        self._programs = programs
        self._gather = gather
        self._batch_size, self._groups = batch_size, len(programs.own_groups)
        self._waiting: dict[_ImageBucket, list[tuple[int, int, PreparedImage]]] = defaultdict(list)
        """Sample, place among its images, and image."""
        self._encoded: dict[int, list[Any]] = {}

    def add(self, sample: int, images: Sequence[PreparedImage]) -> None:
        """Add all images of a sample."""
        self._encoded[sample] = [None] * len(images)
        for place, image in enumerate(images):
            shapes = tuple(array.shape for array in image.arrays)
            bucket = _ImageBucket(shapes, tuple(array.dtype.str for array in image.arrays))
            self._waiting[bucket].append((sample, place, image))

    def encode_full(self) -> None:
        """Encode all full batches that some process has."""
        self._encode(lambda count, size: count // size)

    def finish(self) -> dict[int, np.ndarray]:
        """The tokens [P_i, D] of all images of each sample, in order."""
        self._encode(lambda count, size: -(-count // size))
        nothing = np.zeros((0, self._programs.config.width), self._programs.dtype)
        return {sample: np.concatenate([nothing, *images]) for sample, images in self._encoded.items()}

    def _encode(self, num_batches: Callable[[int, int], int]) -> None:
        gathered = self._gather([[b.shapes, b.dtypes, len(images)] for b, images in self._waiting.items()])
        counts: dict[_ImageBucket, int] = defaultdict(int)
        """The most images that any process has in each bucket."""
        for process in gathered:
            for shapes, dtypes, count in process:
                bucket = _ImageBucket(tuple(map(tuple, shapes)), tuple(dtypes))
                counts[bucket] = max(counts[bucket], count)
        for bucket in sorted(counts):
            size = images_together(self._batch_size, bucket.patches) * self._groups
            for _ in range(num_batches(counts[bucket], size)):
                self._encode_batch(bucket, size)

    def _encode_batch(self, bucket: _ImageBucket, size: int) -> None:
        images, self._waiting[bucket] = self._waiting[bucket][:size], self._waiting[bucket][size:]
        stacked = bucket.stacked([image for _, _, image in images], size)
        tokens = local_rows(self._programs.encode(*stacked))
        for (sample, place, image), rows in zip(images, tokens, strict=False):
            self._encoded[sample][place] = rows[: image.tokens.count].copy()


@dataclass(frozen=True)
class Row:
    """A prompt, and the number of its sample in the split."""

    sample: int
    prompt: Prompt


def count_tokens(rows: Sequence[Row], count: int, gather: Gather) -> tuple[np.ndarray, np.ndarray]:
    """Text and visual tokens of all samples, on every process."""
    num_text, num_visual = np.zeros(count, int), np.zeros(count, int)
    for counts in gather([[row.sample, row.prompt.num_text, row.prompt.num_visual] for row in rows]):
        for sample, text, visual in counts:
            num_text[sample] = max(num_text[sample], text)
            num_visual[sample] = visual
    return num_text, num_visual


def batches_of_all(
    by_bucket: Mapping[Bucket, Sequence[Row]], batch_size: int, mesh: Mesh, gather: Gather
) -> list[tuple[Bucket, tuple[bool, ...]]]:
    """The bucket of every batch of the split, in the same order on every process, and which groups have rows in it."""
    counts = gather([[bucket.visual, bucket.text, len(rows)] for bucket, rows in by_bucket.items()])
    rows_of = [{Bucket(text, visual): count for visual, text, count in process} for process in counts]
    buckets = {bucket for process in rows_of for bucket in process}
    batches: list[tuple[Bucket, tuple[bool, ...]]] = []
    for bucket in sorted(buckets, key=lambda b: (b.visual, b.text)):
        has_rows: dict[int, tuple[bool, ...]] = {}  # of each group, in each batch of the bucket
        for process, num_rows in enumerate(rows_of):
            groups = groups_of(mesh, process)
            blocks = filled_blocks(num_rows.get(bucket, 0), batch_size, len(groups))
            has_rows |= dict(zip(groups, zip(*blocks, strict=True), strict=False))
        columns = [has_rows.get(group, ()) for group in range(mesh.shape[WORK])]
        batches += [(bucket, filled) for filled in zip_longest(*columns, fillvalue=False)]
    return batches


def packed_rows(
    chunk: Sequence[Row], size: int, visual: Mapping[int, np.ndarray], bucket: Bucket, answer_slots: int, programs: ModelPrograms
) -> tuple[PromptBatch, np.ndarray]:
    """This process's rows of a batch, filled up to `size` rows: the prompts, and the visual tokens [size, P, D]."""
    axes = len(programs.config.rope_sections)
    filler = Prompt(np.zeros(1, np.int32), np.zeros(1, bool), np.zeros((axes, 1), np.int32), 1, 0)
    room = size - len(chunk)
    prompts = [*(row.prompt for row in chunk), *[filler] * room]
    samples = [*(row.sample for row in chunk), *[FILLER] * room]
    packed = np.zeros((size, bucket.visual, programs.config.width), programs.dtype)
    for place, row in enumerate(chunk):
        packed[place, : len(visual[row.sample])] = visual[row.sample]
    return collate(prompts, samples, bucket, answer_slots), packed
