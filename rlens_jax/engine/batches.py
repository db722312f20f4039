"""Batches that all processes fill together: images for the vision tower, and rows of prompts for the decoder."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.preparing import Gather, Row
from rlens_jax.engine.schedule import filled_blocks
from rlens_jax.engine.shapes import Shapes
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import FILLER, Branches, ImageArrays, ImageSize, Places, PreparedImage, Prompt, PromptBatch, collate
from rlens_jax.sharding.mesh import groups_of, local_rows
from rlens_jax.sharding.model_axis import WORK

ENCODED_PATCHES = 16384
"""Max patches that a work group encodes together (our decision): more are not faster, and attention among them takes memory."""


def images_together(batch_size: int, patches: int) -> int:
    """How many images of `patches` patches a work group encodes together."""
    return max(1, min(batch_size, ENCODED_PATCHES // patches))


def stacked(images: Sequence[PreparedImage], arrays: ImageArrays, places: int) -> list[np.ndarray]:
    """The arrays of images with a leading axis of `places`, padded with zeros; places without an image are 0."""
    filled = [np.zeros((places, *shape), dtype) for shape, dtype in arrays]
    for place, image in enumerate(images):
        for array, values in zip(filled, image.arrays, strict=True):
            filled_part: tuple[int | slice, ...] = (place, *map(slice, values.shape))
            array[filled_part] = values
    return filled


class Encoder:
    """Visual tokens of this process's samples. Prepared images are large, so they are encoded as soon as they fill a batch.

    All processes encode together: each gives images to its own work groups, or empty ones if it has none of a bucket left.
    """

    def __init__(self, programs: ModelPrograms, shapes: Shapes, gather: Gather):
        self._programs, self._shapes, self._gather = programs, shapes, gather
        self._groups = len(programs.own_groups)
        self._waiting: dict[ImageSize, list[tuple[int, int, PreparedImage]]] = defaultdict(list)
        """Sample, place among its images, and image, by bucket."""
        self._encoded: dict[int, list[Any]] = {}

    def add(self, sample: int, images: Sequence[PreparedImage]) -> None:
        """Add all images of a sample."""
        self._encoded[sample] = [None] * len(images)
        for place, image in enumerate(images):
            self._waiting[self._shapes.image(image.size)].append((sample, place, image))

    def encode_full(self) -> None:
        """Encode all full batches that some process has."""
        self._encode(lambda count, size: count // size)

    def finish(self) -> dict[int, np.ndarray]:
        """The tokens [P_i, D] of all images of each sample, in order."""
        self._encode(lambda count, size: -(-count // size))
        nothing = np.zeros((0, self._programs.config.width), self._programs.dtype)
        return {sample: np.concatenate([nothing, *images]) for sample, images in self._encoded.items()}

    def _encode(self, num_batches: Callable[[int, int], int]) -> None:
        counts: dict[ImageSize, int] = defaultdict(int)
        """The most images that any process has in each bucket."""
        for process in self._gather([[bucket, len(images)] for bucket, images in self._waiting.items()]):
            for bucket, count in process:
                counts[tuple(bucket)] = max(counts[tuple(bucket)], count)
        for bucket in sorted(counts):
            size = images_together(self._shapes.batch_size, math.prod(bucket)) * self._groups
            for _ in range(num_batches(counts[bucket], size)):
                self._encode_batch(bucket, size)

    def _encode_batch(self, bucket: ImageSize, size: int) -> None:
        images, self._waiting[bucket] = self._waiting[bucket][:size], self._waiting[bucket][size:]
        arrays = stacked([image for _, _, image in images], self._shapes.arrays_of(bucket), size)
        tokens = local_rows(self._programs.encode(*arrays))
        for (sample, place, image), rows in zip(images, tokens, strict=False):
            self._encoded[sample][place] = rows[: image.tokens.count].copy()


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
    chunk: Sequence[Row], size: int, visual: Mapping[int, np.ndarray], bucket: Bucket, places: Places, programs: ModelPrograms
) -> tuple[PromptBatch, np.ndarray]:
    """This process's rows of a batch, filled up to `size` rows: the prompts, and the visual tokens [size, P, D]."""
    axes = len(programs.config.rope_sections)
    filler = Prompt(np.zeros(1, np.int32), np.zeros(1, bool), np.zeros((axes, 1), np.int32), 1, 0)
    room = size - len(chunk)
    rows = [Branches.alone(prompt) for prompt in (*(row.prompt for row in chunk), *[filler] * room)]
    samples = [*([row.sample] for row in chunk), *[[FILLER]] * room]
    seeds = [*(row.sample for row in chunk), *[0] * room]
    packed = np.zeros((size, bucket.visual, programs.config.width), programs.dtype)
    for place, row in enumerate(chunk):
        packed[place, : len(visual[row.sample])] = visual[row.sample]
    return collate(rows, samples, seeds, bucket, places), packed
