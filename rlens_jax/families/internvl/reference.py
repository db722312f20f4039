"""InternVL's inputs: the tiles of all images one after another, those of an image under one run of image tokens.

A native config.json does not tell the image token, which the published code keeps in the model: there the input
`img_context_token_id`, int [1], tells it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange

from rlens_jax.errors import UserError
from rlens_jax.families.internvl.model import InternVLConfig
from rlens_jax.families.reference_rows import FamilyInputs, Row, checked, plain_prompt, take_images
from rlens_jax.models.prompt import PreparedImage

TOKEN_NAME = "img_context_token_id"


def read(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: InternVLConfig
) -> list[Row]:
    """See `FamilyInputs.read`."""
    vision = config.vision
    image_token = config.image_token
    if image_token is None:
        image_token = _given_token(where, tensors)
    shape = ("tiles", vision.channels, vision.image_size, vision.image_size)
    pixels = checked(where, tensors, "pixel_values", shape)
    side = vision.patch_size
    patches = rearrange(pixels, "Y c (r y) (q x) -> Y (r q) (c y x)", y=side, x=side)
    # The tower sees each tile alone, so each is an image of one tile here.
    tiles = [PreparedImage((tile[None],), vision.tile_tokens) for tile in patches]
    rows, first = [], 0
    for number, ids in enumerate(token_ids):
        if config.max_tokens is not None and len(ids) > config.max_tokens:
            raise UserError(
                f"{where}: row {number} of input_ids has {len(ids)} tokens; with dynamic RoPE scaling at most "
                f"{config.max_tokens} are supported"
            )
        is_visual = ids == image_token
        _check_runs(where, number, is_visual, vision.tile_tokens)
        own = take_images(where, number, int(is_visual.sum()), tiles, first)
        rows.append(Row(plain_prompt(ids, is_visual), own))
        first += len(own)
    if first != len(tiles):
        raise UserError(f"{where}: pixel_values has {len(tiles)} tiles, input_ids has tokens for {first}")
    return rows


def _given_token(where: str, tensors: Mapping[str, np.ndarray]) -> int:
    if TOKEN_NAME not in tensors:
        raise UserError(f"{where}: holds no {TOKEN_NAME}, and the model's config.json does not tell it either")
    return int(checked(where, tensors, TOKEN_NAME, (1,))[0])


def _check_runs(where: str, number: int, is_visual: np.ndarray, tile_tokens: int) -> None:
    """Each run of image tokens is an image of whole tiles."""
    edges = np.flatnonzero(np.diff(is_visual.astype(np.int8), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2).tolist():
        if (stop - start) % tile_tokens:
            raise UserError(
                f"{where}: row {number} of input_ids has {stop - start} image tokens from token {start} on, which are "
                f"no whole tiles of {tile_tokens}"
            )


HF_INPUTS = FamilyInputs(("pixel_values",), read)
NATIVE_INPUTS = FamilyInputs(("pixel_values", TOKEN_NAME), read)
