"""Reference inputs of LLaVA-OneVision: views padded with zeros and size of each image, and number of images per prompt."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.anyres import cut_patches, read_views, real_views
from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig
from rlens_jax.families.llava_onevision.preparer import image_sources
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, plain_rows, zero_padded
from rlens_jax.models.prompt import Grid, ImageTokens, PreparedImage


def read_images(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: LlavaOnevisionConfig
) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    if any((row == config.video_token).any() for row in token_ids):
        raise UserError(f"{where}: input_ids has video tokens; only images are supported")
    pixels, sizes = read_views(where, tensors, config.vision.channels, config.image_size)
    images = _images(where, pixels, sizes, _alone(where, tensors, len(sizes)), config)
    masks = [ids == config.image_token for ids in token_ids]
    return plain_rows(where, token_ids, masks, images, "image_sizes", "images")


def _alone(where: str, tensors: Mapping[str, np.ndarray], num_images: int) -> np.ndarray:
    """Whether each image is the only one of its prompt, bool [I]; all are without `batch_num_images`, as in transformers."""
    if "batch_num_images" not in tensors:
        return np.ones(num_images, bool)
    counts = checked(where, tensors, "batch_num_images", ("B",)).astype(np.int64)
    if (counts < 0).any() or counts.sum() != num_images:
        raise UserError(f"{where}: batch_num_images is {counts.tolist()} where image_sizes has {num_images} images")
    return np.repeat(counts == 1, counts)


def _images(
    where: str, pixels: np.ndarray, sizes: Sequence[Grid], alone: np.ndarray, config: LlavaOnevisionConfig
) -> list[PreparedImage]:
    sampled = []
    for number, (views, size) in enumerate(zip(pixels, sizes, strict=True)):
        sources, weights, count = image_sources(config, size, bool(alone[number]))
        views = real_views(where, number, views, count, size)
        sampled.append((cut_patches(views, config.vision.patch_size), sources, weights))
    # All of one shape, so that they go through the tower together.
    views, slots = (max((len(image[part]) for image in sampled), default=0) for part in (0, 1))
    return [
        PreparedImage(
            (zero_padded(patches, views), zero_padded(sources, slots), zero_padded(weights, slots)), ImageTokens(len(sources))
        )
        for patches, sources, weights in sampled
    ]


REFERENCE = ReferenceInputs(("pixel_values", "image_sizes", "batch_num_images"), read_images)
