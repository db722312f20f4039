"""Hugging Face's model inputs as ours: one function a family.

To add a family: the names of its inputs, and a function that makes a `Row` of each sample; `model.vision` and `Prompt` are what
they are for ranking.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.errors import UserError, suggest
from rlens_jax.models.prompt import PreparedImage, Prompt
from rlens_jax.models.qwen2_vl import Qwen2VLConfig, patch_places, rope_positions

VIDEO_NAMES = ("pixel_values_videos", "video_grid_thw", "image_sizes_videos", "second_per_grid_ts")
TEXT_NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Row:
    """One sample as our model reads it."""

    prompt: Prompt
    images: tuple[PreparedImage, ...]


@dataclass(frozen=True)
class FamilyInputs:
    """How a family's inputs are called, and read."""

    names: tuple[str, ...]
    read: Callable[[str, Sequence[np.ndarray], Mapping[str, np.ndarray], Any], list[Row]]
    """`read(where, token_ids, tensors, config)`: rows of samples without their padding, and all input tensors."""


def read_rows(where: str, tensors: Mapping[str, np.ndarray], model_type: str, config: Any) -> list[Row]:
    """All samples of a case.

    Args:
        where: names the case in complaints.
        tensors: the inputs by name.
        model_type: the model's family.
        config: the family's own, of our model.

    Raises:
        UserError: the inputs do not fit each other or the model.
    """
    if "input_ids" not in tensors:
        raise UserError(f"{where}: holds no input_ids")
    ids = tensors["input_ids"]
    if ids.ndim != 2 or not ids.size:
        raise UserError(f"{where}: input_ids has shape {list(ids.shape)}, expected [B, T]")
    mask = tensors.get("attention_mask", np.ones_like(ids))
    if mask.shape != ids.shape:
        raise UserError(
            f"{where}: attention_mask has shape {list(mask.shape)}, expected {list(ids.shape)} as input_ids"
        )
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(ids.shape[1])[None] < lengths[:, None]) or not lengths.all():
        raise UserError(
            f"{where}: attention_mask is not 1 ... 1 0 ... 0 in each row; bundles are right-padded"
        )
    vocabulary = config.decoder.vocabulary
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(f"{where}: input_ids has tokens outside the model's vocabulary of {vocabulary}")
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return family_inputs(model_type).read(where, rows, tensors, config)


def family_inputs(model_type: str) -> FamilyInputs:
    """The inputs of a family; UserError for one whose bundles cannot be read."""
    if model_type not in INPUTS:
        raise UserError(
            f"bundles of the family {model_type!r} are not supported{suggest(model_type, INPUTS)}; "
            f"supported are: {', '.join(sorted(INPUTS))}"
        )
    return INPUTS[model_type]


def _qwen2_vl(
    where: str, rows: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: Qwen2VLConfig
) -> list[Row]:
    vision = config.vision
    group, width = vision.merge_size**2, vision.sizes["C"]
    if any((row == config.video_token).any() for row in rows):
        raise UserError(f"{where}: input_ids has video tokens; only images are supported")
    types = tensors.get("mm_token_type_ids")
    if types is not None and not np.array_equal(types, tensors["input_ids"] == config.image_token):
        raise UserError(f"{where}: mm_token_type_ids must be 1 for image tokens and 0 for all others")
    grids = _array(where, tensors, "image_grid_thw", (0, 3), "[I, 3]")
    patches = _array(where, tensors, "pixel_values", (0, width), f"[patches, {width}]")
    if (grids[:, 0] != 1).any():
        raise UserError(
            f"{where}: image_grid_thw has {int(grids[:, 0].max())} frames; only images are supported"
        )
    sizes = grids.prod(axis=1)
    if sizes.sum() != len(patches):
        raise UserError(
            f"{where}: pixel_values has {len(patches)} patches where image_grid_thw has {int(sizes.sum())}"
        )
    slots = int(sizes.max(initial=group))
    starts = np.cumsum(sizes) - sizes
    made, image = [], 0
    for number, ids in enumerate(rows):
        is_visual = ids == config.image_token
        images: list[PreparedImage] = []
        own: list[tuple[int, int]] = []
        missing = int(is_visual.sum())
        while missing > 0 and image < len(grids):
            size, grid = int(sizes[image]), (int(grids[image, 1]), int(grids[image, 2]))
            pad = (0, slots - size)
            arrays = (
                np.pad(patches[starts[image] : starts[image] + size], (pad, (0, 0))),
                np.pad(patch_places(grid, vision.merge_size), (pad, (0, 0))),
                np.array(size, np.int32),
            )
            images.append(PreparedImage(arrays, size // group))
            own.append(grid)
            missing -= size // group
            image += 1
        if missing:
            raise UserError(
                f"{where}: row {number} of input_ids has {int(is_visual.sum())} image tokens, to which image_grid_thw "
                "does not add up"
            )
        positions, following = rope_positions(is_visual, own, vision.merge_size)
        prompt = Prompt(ids.astype(np.int32), is_visual, positions, following, 0)
        made.append(Row(prompt, tuple(images)))
    if image != len(grids):
        raise UserError(f"{where}: image_grid_thw has {len(grids)} images, input_ids has tokens for {image}")
    return made


def _array(
    where: str, tensors: Mapping[str, np.ndarray], name: str, empty: tuple[int, ...], shape: str
) -> np.ndarray:
    """A tensor, or one of shape `empty` when it is not there; its last axis must be as long as that of `empty`."""
    array = tensors.get(name, np.zeros(empty, np.int64 if name == "image_grid_thw" else np.float32))
    if array.ndim != len(empty) or array.shape[1:] != empty[1:]:
        raise UserError(f"{where}: {name} has shape {list(array.shape)}, expected {shape}")
    return array


INPUTS: Mapping[str, FamilyInputs] = {
    "qwen2_vl": FamilyInputs((*TEXT_NAMES, "mm_token_type_ids", "pixel_values", "image_grid_thw"), _qwen2_vl),
}
"""By `model_type`."""
