"""LLaVA-1.5's sizes and vision module: CLIP on one square view, and a connector of two linear maps. One token per patch."""

from dataclasses import dataclass, replace

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.errors import UserError
from rlens_jax.families.clip import CLIP, ClipConfig, ClipTower, read_clip
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import read_llama_decoder
from rlens_jax.families.projector import Projector, require_projector
from rlens_jax.families.tower_marks import with_marks
from rlens_jax.models.decoder import DecoderConfig

TOKENS = {"image_token_index": 32000}
ORIGINAL = "is LLaVA's original layout; use the -hf model, such as"
"""Its files have other names, and its images are padded where those of transformers are cropped."""


@dataclass(frozen=True)
class LlavaConfig:
    """Everything that shapes a LLaVA-1.5 model."""

    decoder: DecoderConfig
    vision: ClipConfig
    image_token: int


def read_config(config: ConfigReader) -> LlavaConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported.

    `text_config` and `vision_config` are sparse: what they leave out has the default of the class of transformers.
    """
    if "mm_vision_tower" in config.fields:
        tiles = str(config.fields.get("mm_patch_merge_type", "")).startswith("spatial")
        name = "llava-v1.6-vicuna-7b-hf" if tiles else "llava-1.5-7b-hf"
        raise UserError(f"{config.where}: {ORIGINAL} llava-hf/{name}")
    config = ConfigReader(config.fields, config.where, TOKENS)
    vision = config.section("vision_config", CLIP)
    vision.require("model_type", "clip_vision_model")
    require_projector(config)
    config.require("vision_feature_layer", -2)
    config.require("vision_feature_select_strategy", "default")
    decoder = read_llama_decoder(config.section("text_config"))
    return LlavaConfig(
        # Either place ties the head.
        replace(decoder, tied_head=config.flag("tie_word_embeddings") or decoder.tied_head),
        read_clip(vision),
        config.token("image_token_id", "image_token_index", vocabulary=decoder.vocabulary),
    )


class VisionTower(Projector):
    """Patches of a view to visual tokens: CLIP and the connector."""

    def __init__(self, config: LlavaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config.vision.width, config.decoder.width, dtype=dtype, rngs=rngs)
        self.tower = ClipTower(config.vision, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J D"]:
        """Visual tokens of each image, one per patch; all images have the same patches, so none is padding."""
        return self.project(self.tower(patches))

    def marked(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J D_and_marks"]:
        """The same, and the marks of each token."""
        x, marks = self.tower.marked(patches)
        return with_marks(self.project(x), marks)
