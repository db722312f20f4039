"""Reference inputs of LLaVA-1.5: the view of each image."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.families.anyres import cut_patches
from rlens_jax.families.llava.model import LlavaConfig
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, plain_rows
from rlens_jax.models.prompt import ImageTokens, PreparedImage


def read_images(where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: LlavaConfig) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    vision = config.vision
    shape = ("I", vision.channels, vision.image_size, vision.image_size)
    patches = cut_patches(checked(where, tensors, "pixel_values", shape), vision.patch_size)
    images = [PreparedImage((view,), ImageTokens(vision.num_patches)) for view in patches]
    masks = [ids == config.image_token for ids in token_ids]
    return plain_rows(where, token_ids, masks, images, "pixel_values", "images")


REFERENCE = ReferenceInputs(("pixel_values",), read_images)
