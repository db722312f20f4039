"""Reference inputs of LLaVA-NeXT: views padded with zeros, and size of each image."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.families.anyres import cut_patches, read_views, real_views
from rlens_jax.families.llava_next.model import LlavaNextConfig, image_rows
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, plain_rows, zero_padded
from rlens_jax.models.prompt import ImageTokens, PreparedImage


def read_images(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: LlavaNextConfig
) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    pixels, sizes = read_views(where, tensors, config.vision.channels, config.vision.image_size)
    images = []
    for number, (views, size) in enumerate(zip(pixels, sizes, strict=True)):
        rows, count = image_rows(config, size)
        images.append((cut_patches(real_views(where, number, views, count, size), config.vision.patch_size), rows))
    # All of one shape, so that they go through the tower together.
    views, slots = (max((len(image[part]) for image in images), default=0) for part in (0, 1))
    padded = [
        PreparedImage((zero_padded(patches, views), zero_padded(rows, slots)), ImageTokens(len(rows))) for patches, rows in images
    ]
    masks = [ids == config.image_token for ids in token_ids]
    return plain_rows(where, token_ids, masks, padded, "image_sizes", "images")


REFERENCE = ReferenceInputs(("pixel_values", "image_sizes"), read_images)
