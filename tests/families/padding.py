"""Prepared images as the engine pads them."""

from collections.abc import Sequence

from rlens_jax.engine.buckets import smallest
from rlens_jax.engine.encoding import stacked
from rlens_jax.engine.shapes import image_slots
from rlens_jax.families.registry import ModelKind
from rlens_jax.models.prompt import PreparedImage


def padded(images: Sequence[PreparedImage], kind: ModelKind, patch_slots: Sequence[int]) -> list[PreparedImage]:
    """The images, each padded to its smallest bucket."""
    filled = []
    for image in images:
        bucket = smallest(kind.image_sizes(patch_slots), image.size, image_slots)
        assert bucket is not None
        arrays = stacked([image], kind.image_arrays(bucket), 1)
        filled.append(PreparedImage(tuple(array[0] for array in arrays), image.tokens))
    return filled
