"""Reference inputs of InternVL: the tiles of all images; each run of image tokens belongs to the tiles of one image.

The input `img_context_token_id`, int [1], is the image token, which the published code of the native layout keeps in the model.
A bundle may leave it out; then it is that of the compared model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.families.internvl.model import InternVLConfig
from rlens_jax.families.internvl.preparer import IMAGE_TOKEN, cut_patches, read_tokenizer
from rlens_jax.families.reference_inputs import ReferenceInputs, Row, checked, plain_rows
from rlens_jax.models.prompt import ImageTokens, PreparedImage

TOKEN_NAME = "img_context_token_id"


def read_images(
    where: str, token_ids: Sequence[np.ndarray], tensors: Mapping[str, np.ndarray], config: InternVLConfig
) -> list[Row]:
    """See `ReferenceInputs.read_images`."""
    vision = config.vision
    image_token = _image_token(where, tensors, config)
    shape = ("tiles", vision.channels, vision.image_size, vision.image_size)
    patches = cut_patches(checked(where, tensors, "pixel_values", shape), vision.patch_size)
    # The tower sees each tile alone, so each is an image of one tile here.
    tiles = [PreparedImage((tile[None],), ImageTokens(vision.tile_tokens)) for tile in patches]
    masks = [ids == image_token for ids in token_ids]
    for number, is_visual in enumerate(masks):
        if config.max_tokens is not None and len(is_visual) > config.max_tokens:
            raise UserError(
                f"{where}: row {number} of input_ids has {len(is_visual)} tokens; with dynamic RoPE scaling at most "
                f"{config.max_tokens} are supported"
            )
        _check_runs(where, number, is_visual, vision.tile_tokens)
    return plain_rows(where, token_ids, masks, tiles, "pixel_values", "tiles")


def _image_token(where: str, tensors: Mapping[str, np.ndarray], config: InternVLConfig) -> int:
    token = int(checked(where, tensors, TOKEN_NAME, (1,))[0])
    if config.image_token not in (None, token):
        raise UserError(f"{where}: {TOKEN_NAME} is {token}, but the model's config.json says {config.image_token}")
    return token


def _token_of_model(folder: Path, config: InternVLConfig) -> np.ndarray:
    """The image token of a model folder: from config.json or, in the native layout, from the tokenizer."""
    token = read_tokenizer(folder).get_vocab().get(IMAGE_TOKEN) if config.image_token is None else config.image_token
    if token is None:
        raise UserError(f"{folder}: the tokenizer has no token {IMAGE_TOKEN}, so it is not that of an InternVL")
    return np.array([token])


def _check_runs(where: str, number: int, is_visual: np.ndarray, tile_tokens: int) -> None:
    """Check that each run of image tokens is as long as some whole tiles."""
    edges = np.flatnonzero(np.diff(is_visual.astype(np.int8), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2).tolist():
        if (stop - start) % tile_tokens:
            raise UserError(
                f"{where}: row {number} of input_ids has {stop - start} image tokens from token {start} on, which are "
                f"no whole tiles of {tile_tokens}"
            )


REFERENCE = ReferenceInputs(("pixel_values", TOKEN_NAME), read_images, {TOKEN_NAME: _token_of_model})
