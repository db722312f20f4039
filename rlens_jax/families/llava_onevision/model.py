"""LLaVA-OneVision's vision module: SigLIP on a base view and the tiles of a grid, an MLP connector, and newlines.

A single image is seen as a whole (the base view) and, scaled to the best of the allowed resolutions, as square tiles. The
visual tokens of the tiles form one grid: rows and columns of padding are cut off, a large grid is scaled down bilinearly, and
`image_newline` follows each row (Hugging Face's `pack_image_features`). If a prompt has several images, each one becomes its
base view, padded to a square, and one newline.

Cutting, scaling and newlines are a weighted sum of at most four rows of one table, so they come as data: the shapes of an image
depend only on its bucket of views. Newlines are visual tokens (our decision, see docs/method.md).
"""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlens_jax.families.anyres import read_pinpoints
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import read_qwen2_decoder
from rlens_jax.families.projector import Projector, require_projector
from rlens_jax.families.siglip import SIGLIP, SiglipConfig, SiglipTower, read_siglip
from rlens_jax.families.tower_marks import with_marks
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.prompt import Grid

TOKENS = {"image_token_index": 151646, "video_token_index": 151647}
PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
"""Default of the class of transformers: up to 6 x 6 views of 384 pixels."""


@dataclass(frozen=True)
class LlavaOnevisionConfig:
    """Everything that shapes a LLaVA-OneVision model."""

    decoder: DecoderConfig
    vision: SiglipConfig
    image_size: int
    """Pixels per side of a view; pixels that do not fill a patch are not seen."""
    pinpoints: tuple[Grid, ...]
    """Resolutions to which an image may be scaled: height and width in pixels."""
    max_tiles: int
    """The grid keeps about as many visual tokens as this number of tiles has."""
    image_token: int
    video_token: int

    @property
    def side(self) -> int:
        """Patches per side of a view."""
        return self.image_size // self.vision.patch_size


def read_config(config: ConfigReader) -> LlavaOnevisionConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    config = ConfigReader(config.fields, config.where, TOKENS)
    text, vision = config.section("text_config"), config.section("vision_config", SIGLIP)
    text.require("model_type", "qwen2")
    vision.require("model_type", "siglip_vision_model")
    require_projector(config)
    config.require("vision_feature_layer", -1)
    config.require("vision_feature_select_strategy", "full")
    config.require("use_image_newline_parameter", True)
    aspect_ratio = config.fields.get("vision_aspect_ratio", "anyres_max_9")
    max_tiles = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", str(aspect_ratio))
    if max_tiles is None:
        raise config.error("vision_aspect_ratio", "is supported only as 'anyres_max_N', N below 10000", aspect_ratio)
    tower, decoder = read_siglip(vision), read_qwen2_decoder(text)
    image_size = vision.size("image_size")
    return LlavaOnevisionConfig(
        # For this family, transformers ties the head if either place says so.
        replace(decoder, tied_head=config.flag("tie_word_embeddings") or decoder.tied_head),
        tower,
        image_size,
        read_pinpoints(config, image_size, PINPOINTS),
        int(max_tiles[1]),
        image_token=config.token("image_token_id", "image_token_index", vocabulary=decoder.vocabulary),
        video_token=config.token("video_token_id", "video_token_index", vocabulary=decoder.vocabulary),
    )


def full_views(views: Float[Array | np.ndarray, "v J c"]) -> tuple[Array | np.ndarray, Int[Array, "v J"], Int[Array, " v"]]:
    """The arguments of `SiglipTower` for views without padding patches."""
    count, patches, _ = views.shape
    positions = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (count, patches))
    return views, positions, jnp.full(count, patches, jnp.int32)


class VisionTower(Projector):
    """Views to visual tokens: SigLIP, the connector and the newline."""

    def __init__(self, config: LlavaOnevisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.decoder.width
        super().__init__(config.vision.width, width, dtype=dtype, rngs=rngs)
        self.tower = SiglipTower(config.vision, dtype=dtype, rngs=rngs)
        self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,), dtype) * jnp.asarray(width**-0.5, dtype))

    def features(self, views: Float[Array | np.ndarray, "v J c"]) -> Float[Array, "v J E"]:
        """States of the tower for v views, none of which has padding patches."""
        return self.tower(*full_views(views))

    def __call__(
        self,
        views: Float[Array | np.ndarray, "I v J c"],
        sources: Int[Array | np.ndarray, "I Z corners"],
        weights: Float[Array | np.ndarray, "I Z corners"],
    ) -> Float[Array, "I Z D"]:
        """Visual tokens of each image, including newlines; padding tokens are 0.

        Args:
            views: pixel values of each patch, base view first; padding views may hold any finite numbers.
            sources: rows of the table (see `anyres.NEWLINE`) that each visual token is interpolated from.
            weights: weight of each of these rows, float32.
        """
        return self._placed(self.project(self.features(views.reshape(-1, *views.shape[2:]))), sources, weights)

    def marked(
        self,
        views: Float[Array | np.ndarray, "I v J c"],
        sources: Int[Array | np.ndarray, "I Z corners"],
        weights: Float[Array | np.ndarray, "I Z corners"],
    ) -> Float[Array, "I Z D_and_marks"]:
        """The same, and the marks of each token, interpolated like the tokens; those of a newline are 0."""
        x, marks = self.tower.marked(*full_views(views.reshape(-1, *views.shape[2:])))
        return self._placed(with_marks(self.project(x), marks), sources, weights)

    def _placed(
        self,
        x: Float[Array, "Iv J numbers"],
        sources: Int[Array | np.ndarray, "I Z corners"],
        weights: Float[Array | np.ndarray, "I Z corners"],
    ) -> Float[Array, "I Z numbers"]:
        images, numbers = len(sources), x.shape[-1]
        newline = jnp.pad(self.image_newline[...], (0, numbers - self.image_newline.shape[0])).astype(x.dtype)
        table = jnp.concatenate([jnp.broadcast_to(newline, (images, 1, numbers)), x.reshape(images, -1, numbers)], axis=1)
        pick = jax.vmap(lambda rows, places: rows[places])
        # In float32, as torch interpolates; a row with weight 1 stays bit-equal.
        tokens = sum(pick(table, sources[:, :, q]).astype(jnp.float32) * weights[:, :, q, None] for q in range(sources.shape[2]))
        return jnp.asarray(tokens, table.dtype)
