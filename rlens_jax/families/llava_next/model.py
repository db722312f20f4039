"""LLaVA-NeXT's vision module: CLIP on a base view and the tiles of a grid, a connector of two linear maps, and newlines.

The tiles of `anyres` are neither scaled down nor left out when a prompt has several images. Which rows of the table are the
visual tokens of an image comes as data, so shapes depend only on its number of views. Newlines are visual tokens (our decision,
see docs/method.md).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlens_jax.families import llava
from rlens_jax.families.anyres import base_rows, best_tiles, read_pinpoints, tile_rows
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.llava.model import LlavaConfig
from rlens_jax.models.prompt import Grid

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""Default of the class of transformers, and the values of all published models."""


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """Everything that shapes a LLaVA-NeXT model."""

    pinpoints: tuple[Grid, ...]
    """Resolutions to which an image may be scaled: height and width in pixels."""


def read_config(config: ConfigReader) -> LlavaNextConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    base = llava.model.read_config(config)
    config.require("use_image_newline_parameter", True)
    return LlavaNextConfig(base.decoder, base.vision, base.image_token, read_pinpoints(config, base.vision.image_size, PINPOINTS))


def image_rows(config: LlavaNextConfig, image_size: Grid) -> tuple[np.ndarray, int]:
    """Visual tokens of an image of this height and width as rows of the table, int32 [Z], and its number of views."""
    vision = config.vision
    tiles = best_tiles(image_size, config.pinpoints, vision.image_size)
    grid = tile_rows(image_size, tiles, vision.side)
    lines = np.pad(grid, ((0, 0), (0, 1)))  # a newline is row 0 of the table
    return np.concatenate([base_rows(vision.side), lines.reshape(-1)]).astype(np.int32), 1 + tiles[0] * tiles[1]


class VisionTower(llava.model.VisionTower):
    """Views to visual tokens: CLIP, the connector and the newline."""

    def __init__(self, config: LlavaNextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        width = config.decoder.width
        self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,), dtype) * jnp.asarray(width**-0.5, dtype))

    def __call__(  # type: ignore[override]
        self, views: Float[Array | np.ndarray, "I v J c"], rows: Int[Array | np.ndarray, "I Z"]
    ) -> Float[Array, "I Z D"]:
        """Visual tokens of each image, including newlines; those of padding are newlines.

        Args:
            views: pixel values of each patch, base view first; padding views may hold any finite numbers.
            rows: row of the table of `anyres` that each visual token is; 0 in padding.
        """
        return self._placed(super().__call__(views.reshape(-1, *views.shape[2:])), rows)

    def marked(  # type: ignore[override]
        self, views: Float[Array | np.ndarray, "I v J c"], rows: Int[Array | np.ndarray, "I Z"]
    ) -> Float[Array, "I Z D_and_marks"]:
        """The same, and the marks of each token; those of a newline are 0."""
        return self._placed(super().marked(views.reshape(-1, *views.shape[2:])), rows)

    def _placed(self, tokens: Float[Array, "Iv J numbers"], rows: Int[Array | np.ndarray, "I Z"]) -> Float[Array, "I Z numbers"]:
        images, numbers = len(rows), tokens.shape[-1]
        newline = jnp.pad(self.image_newline[...], (0, numbers - self.image_newline.shape[0])).astype(tokens.dtype)
        table = jnp.concatenate([jnp.broadcast_to(newline, (images, 1, numbers)), tokens.reshape(images, -1, numbers)], axis=1)
        return jax.vmap(lambda tokens, places: tokens[places])(table, jnp.asarray(rows))
