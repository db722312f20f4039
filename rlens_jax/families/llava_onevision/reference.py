"""LLaVA-OneVision's inputs: each image's views, padded with zeros, and its size; and how many images each prompt has."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig, cut_patches, image_sources
from rlens_jax.families.reference_rows import FamilyInputs, Row, checked, padded, plain_prompt, take_images
from rlens_jax.models.prompt import PreparedImage


def read(
    where: str,
    token_ids: Sequence[np.ndarray],
    tensors: Mapping[str, np.ndarray],
    config: LlavaOnevisionConfig,
) -> list[Row]:
    """See `FamilyInputs.read`."""
    if any((row == config.video_token).any() for row in token_ids):
        raise UserError(f"{where}: input_ids has video tokens; only images are supported")
    sizes = checked(where, tensors, "image_sizes", ("I", 2)).astype(np.int64)
    shape = ("I", "views", config.vision.channels, config.image_size, config.image_size)
    pixels = checked(where, tensors, "pixel_values", shape)
    if len(sizes) != len(pixels):
        raise UserError(f"{where}: pixel_values has {len(pixels)} images where image_sizes has {len(sizes)}")
    if (sizes < 1).any():
        raise UserError(f"{where}: image_sizes must be heights and widths in pixels, not {sizes.min()}")
    images = _images(where, pixels, sizes, _alone(where, tensors, len(sizes)), config)
    rows, first = [], 0
    for number, ids in enumerate(token_ids):
        is_visual = ids == config.image_token
        own = take_images(where, number, int(is_visual.sum()), images, first)
        rows.append(Row(plain_prompt(ids, is_visual), own))
        first += len(own)
    if first != len(images):
        raise UserError(f"{where}: image_sizes has {len(images)} images, input_ids has tokens for {first}")
    return rows


def _alone(where: str, tensors: Mapping[str, np.ndarray], num_images: int) -> np.ndarray:
    """Whether each image is the only one of its prompt, bool [I]; all are when the bundle does not tell, as for transformers."""
    if "batch_num_images" not in tensors:
        return np.ones(num_images, bool)
    counts = checked(where, tensors, "batch_num_images", ("B",)).astype(np.int64)
    if (counts < 0).any() or counts.sum() != num_images:
        raise UserError(f"{where}: batch_num_images is {counts.tolist()} where image_sizes has {num_images} images")
    return np.repeat(counts == 1, counts)


def _images(
    where: str, pixels: np.ndarray, sizes: np.ndarray, alone: np.ndarray, config: LlavaOnevisionConfig
) -> list[PreparedImage]:
    found = []
    for number, (views, size) in enumerate(zip(pixels, sizes, strict=True)):
        image_size = int(size[0]), int(size[1])
        sources, weights, count = image_sources(config, image_size, bool(alone[number]))
        if count > len(views) or views[count:].any():
            given = np.flatnonzero(views.any(axis=(1, 2, 3)))
            raise UserError(
                f"{where}: image {number} has {int(given.max(initial=-1)) + 1} views in pixel_values, "
                f"{count} by its image_sizes {list(image_size)} (height, width)"
            )
        found.append((cut_patches(views[:count], config.vision.patch_size), sources, weights))
    # Of equal shapes, so that they go through the tower together.
    views, slots = (max((len(image[part]) for image in found), default=0) for part in (0, 1))
    return [
        PreparedImage((padded(patches, views), padded(sources, slots), padded(weights, slots)), len(sources))
        for patches, sources, weights in found
    ]


INPUTS = FamilyInputs(("pixel_values", "image_sizes", "batch_num_images"), read)
