"""Reference inputs of the toy family: all images have the same number of patches."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, plain_rows
from rlens_jax.models.prompt import ImageTokens, PreparedImage
from tests.families.toy_family.model import COLOURS, IMAGE_TOKEN, ToyConfig


def read_images(where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: ToyConfig) -> list[Row]:
    patches = checked(where, tensors, "colours", ("I", "J", COLOURS))
    images = [PreparedImage((image,), ImageTokens(len(image))) for image in patches]
    masks = [ids == IMAGE_TOKEN for ids in token_ids]
    return plain_rows(where, token_ids, masks, images, "colours", "images")


REFERENCE = ReferenceInputs(("colours",), read_images)
