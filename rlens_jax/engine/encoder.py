"""Images to visual tokens: prepared images of equal shapes are stacked and go through the vision tower together."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.models.prompt import PreparedImage
from rlens_jax.sharding.mesh import local_rows

Gather = Callable[[Any], list[Any]]
"""Every process's value, in the order of the processes."""

ENCODED_PATCHES = 16384
"""Max patches that a work group encodes together (our decision): more are not faster, and attention among them takes memory."""


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
