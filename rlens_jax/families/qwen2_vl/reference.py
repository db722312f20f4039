"""Qwen2-VL's inputs: all images' patches one after another in merge order, and each image's frames, rows and columns."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig, patch_places, rope_positions
from rlens_jax.families.reference_rows import FamilyInputs, Row, checked, padded, take_images
from rlens_jax.models.prompt import PreparedImage, Prompt


def read(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: Qwen2VLConfig
) -> list[Row]:
    """See `FamilyInputs.read`."""
    vision = config.vision
    if any((row == config.video_token).any() for row in token_ids):
        raise UserError(f"{where}: input_ids has video tokens; only images are supported")
    types = tensors.get("mm_token_type_ids")
    if types is not None and not np.array_equal(types, tensors["input_ids"] == config.image_token):
        raise UserError(f"{where}: mm_token_type_ids must be 1 for image tokens and 0 for all others")
    grids = checked(where, tensors, "image_grid_thw", ("I", 3)).astype(np.int64)
    patches = checked(where, tensors, "pixel_values", ("patches", vision.sizes["C"]))
    if (grids[:, 0] != 1).any():
        raise UserError(f"{where}: image_grid_thw has {int(grids[:, 0].max())} frames; only images are supported")
    sizes = grids.prod(axis=1)
    if sizes.sum() != len(patches):
        raise UserError(f"{where}: pixel_values has {len(patches)} patches where image_grid_thw has {int(sizes.sum())}")
    shapes = [(int(rows), int(columns)) for _, rows, columns in grids]
    slots = int(sizes.max(initial=0))
    images = []
    for shape, values in zip(shapes, np.split(patches, np.cumsum(sizes)[:-1]), strict=False):
        places = padded(patch_places(shape, vision.merge_size), slots)
        arrays = padded(values, slots), places, np.array(len(values), np.int32)
        images.append(PreparedImage(arrays, len(values) // vision.merge_size**2))
    rows, first = [], 0
    for number, ids in enumerate(token_ids):
        is_visual = ids == config.image_token
        own = take_images(where, number, int(is_visual.sum()), images, first)
        positions, following = rope_positions(is_visual, shapes[first : first + len(own)], vision.merge_size)
        rows.append(Row(Prompt(ids.astype(np.int32), is_visual, positions, following, 0), own))
        first += len(own)
    if first != len(images):
        raise UserError(f"{where}: image_grid_thw has {len(images)} images, input_ids has tokens for {first}")
    return rows


INPUTS = FamilyInputs(("mm_token_type_ids", "pixel_values", "image_grid_thw"), read)
