"""Visual tokens of images, in batches that all processes fill together."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.shapes import Shapes
from rlens_jax.models.prompt import ImageArrays, ImageSize, PreparedImage
from rlens_jax.sharding.mesh import local_rows

Gather = Callable[[Any], list[Any]]
"""Every process's value, in the order of the processes."""

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
    """Visual tokens of this process's images. Prepared images are large, so they are encoded as soon as they fill a batch.

    All processes encode together: each gives images to its own work groups, or empty ones if it has none of a bucket left.
    `marked` as in `ModelPrograms.encode`.
    """

    def __init__(self, programs: ModelPrograms, shapes: Shapes, gather: Gather, *, marked: bool = False):
        self._programs, self._shapes, self._gather, self._marked = programs, shapes, gather, marked
        self._groups = len(programs.own_groups)
        self._waiting: dict[ImageSize, list[tuple[int, int, PreparedImage]]] = defaultdict(list)
        """Group, place in it, and image, by bucket."""
        self._encoded: dict[int, list[Any]] = {}

    def add(self, group: int, images: Sequence[PreparedImage]) -> None:
        """Add a group of images, those of one sample or of several that have the same."""
        self._encoded[group] = [None] * len(images)
        for place, image in enumerate(images):
            self._waiting[self._shapes.image(image.size)].append((group, place, image))

    def encode_full(self) -> None:
        """Encode all full batches that some process has."""
        self._encode(lambda count, size: count // size)

    def finish(self) -> dict[int, np.ndarray]:
        """The tokens [P_i, visual_width] of all images of each group, in order."""
        self._encode(lambda count, size: -(-count // size))
        width = self._programs.config.visual_width
        # A sample without images has no marks either; two numbers stand for them.
        nothing = np.zeros((0, width + 2), np.float32) if self._marked else np.zeros((0, width), self._programs.dtype)
        return {group: np.concatenate(images) if images else nothing for group, images in self._encoded.items()}

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
        tokens = local_rows(self._programs.encode(*arrays, marked=self._marked))
        for (group, place, image), rows in zip(images, tokens, strict=False):
            self._encoded[group][place] = rows[: image.tokens.count].copy()
