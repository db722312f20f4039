"""Reference inputs of Qwen2-VL: the patches of all images in merge order, and frames, rows and columns of each image."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.qwen2_vl.preparer import patch_places, rope_positions
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, deal_images, zero_padded
from rlens_jax.models.prompt import ImageTokens, PreparedImage, Prompt


def read_images(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: Qwen2VLConfig
) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    vision = config.vision
    if any((row == config.video_token).any() for row in token_ids):
        raise UserError(f"{where}: input_ids has video tokens; only images are supported")
    types = tensors.get("mm_token_type_ids")
    if types is not None and not np.array_equal(types, tensors["input_ids"] == config.image_token):
        raise UserError(f"{where}: mm_token_type_ids must be 1 for image tokens and 0 for all others")
    grids = checked(where, tensors, "image_grid_thw", ("I", 3)).astype(np.int64)
    patches = checked(where, tensors, "pixel_values", ("patches", vision.sizes["c"]))
    if (grids[:, 0] != 1).any():
        raise UserError(f"{where}: image_grid_thw has {int(grids[:, 0].max())} frames; only images are supported")
    sizes = grids.prod(axis=1)
    if sizes.sum() != len(patches):
        raise UserError(f"{where}: pixel_values has {len(patches)} patches where image_grid_thw has {int(sizes.sum())}")
    slots = int(sizes.max(initial=0))
    images = []
    for (_, rows, columns), values in zip(grids.tolist(), np.split(patches, np.cumsum(sizes)[:-1]), strict=False):
        grid = (rows, columns)
        places = zero_padded(patch_places(grid, vision.merge_size), slots)
        arrays = zero_padded(values, slots), places, np.array(len(values), np.int32)
        images.append(PreparedImage(arrays, ImageTokens(len(values) // vision.merge_size**2, grid)))
    masks = [ids == config.image_token for ids in token_ids]
    dealt = deal_images(where, masks, images, "image_grid_thw", "images")
    samples = []
    for ids, mask, taken in zip(token_ids, masks, dealt, strict=True):
        positions, following = rope_positions(mask, [image.tokens.grid for image in taken], vision.merge_size)
        samples.append(Row(Prompt(ids.astype(np.int32), mask, positions, following, 0), taken))
    return samples


REFERENCE = ReferenceInputs(("mm_token_type_ids", "pixel_values", "image_grid_thw"), read_images)
