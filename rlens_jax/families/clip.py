"""The vision tower of CLIP (arXiv 2103.00020), which LLaVA-1.5 and LLaVA-NeXT use up to the block before the last.

A class token stands before the patches, a norm before the first block. The features are the states that enter the last block,
without the class token; so neither the last block nor the norm behind it is computed. Images have one size and no padding.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_LAYERS, MOST_PIXELS, ConfigReader
from rlens_jax.families.siglip import TowerConfig, TowerLayer, run_layers, run_span, tower_layer_part, tower_sizes
from rlens_jax.families.table import Ignored, Part, Row, linear, norm, pattern_sizes
from rlens_jax.families.tower_marks import Marks, class_token_marks, tower_layer
from rlens_jax.models.layers import LayerNorm, Linear

CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Defaults of CLIPVisionConfig in transformers, the same from 4.45 to 5.24."""


@dataclass(frozen=True)
class ClipConfig(TowerConfig):
    """Sizes and constants of CLIP's tower; `depth` counts the blocks that are computed, all but the last."""

    image_size: int
    """Pixels per side of an image; pixels that do not fill a patch are not seen."""
    norm_eps: float

    @property
    def side(self) -> int:
        """Patches per side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, J."""
        return self.side**2


def read_clip(vision: ConfigReader) -> ClipConfig:
    """Read the sizes from a `vision_config` with these defaults; UserError if it asks for what is not supported."""
    vision.require("hidden_act", "quick_gelu")
    blocks = vision.size("num_hidden_layers", most=MOST_LAYERS)
    if blocks < 2:
        raise UserError(f"{vision.where}: num_hidden_layers {blocks} leaves no block before the last, which is not used")
    patch_size, image_size = vision.size("patch_size", most=MOST_PIXELS), vision.size("image_size", most=MOST_PIXELS)
    if image_size < patch_size:
        raise UserError(f"{vision.where}: image_size {image_size} is smaller than patch_size {patch_size}")
    return ClipConfig(
        **(tower_sizes(vision) | {"depth": blocks - 1}),
        patch_size=patch_size,
        image_size=image_size,
        norm_eps=vision.number("layer_norm_eps", most=1),
    )


def quick_gelu(x: Float[Array, "*I F"]) -> Float[Array, "*I F"]:
    """OpenAI's approximation of GELU, x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


class ClipLayer(TowerLayer):
    """Attention and an MLP with quick GELU."""

    def __init__(self, config: ClipConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.width, eps=config.norm_eps, dtype=dtype)
        super().__init__(config, norm, qkv_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "I J E"], group: Int[Array, "I J"]) -> Float[Array, "I J E"]:
        x = self.attend(x, group)
        return x + self.fc2(quick_gelu(self.fc1(self.mlp_norm(x))))


class ClipTower(nnx.Module):
    """Patch, class and position embeddings, a norm, and stacked layers."""

    def __init__(self, config: ClipConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        scale, width = jnp.asarray(0.02, dtype), config.width
        self.depth = config.depth
        self.patch_embed = Linear("IJc,cE->IJE", config.sizes, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,), dtype) * scale)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), (1 + config.num_patches, width), dtype) * scale)
        self.pre_norm = LayerNorm(width, eps=config.norm_eps, dtype=dtype)
        make = nnx.vmap(lambda rngs: ClipLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.depth))

    def __call__(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J E"]:
        """States of the patches before the last block of the published tower.

        Args:
            patches: pixel values of all patches, row by row, each in (channel, row, column) order.
        """
        x = self._entering(patches)
        return run_layers(self.layers, x, jnp.zeros(x.shape[:2], jnp.int32))[:, 1:]

    def marked(self, patches: Float[Array | np.ndarray, "I J c"]) -> tuple[Float[Array, "I J E"], Marks]:
        """The same states, and marks by the class token's attention in the last block that is computed."""
        x, last = self._entering(patches), self.depth - 1
        group = jnp.zeros(x.shape[:2], jnp.int32)
        x = run_span(self.layers, 0, last, x, group)
        layer = tower_layer(self.layers, last)
        y = layer.attention_norm(x)
        marks = class_token_marks(layer.q_proj(y[:, :1]).swapaxes(1, 2), layer.k_proj(y).swapaxes(1, 2))
        return layer(x, group)[:, 1:], marks

    def _entering(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J_and_class E"]:
        """States of the class token and the patches before the first block."""
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (x.shape[0], 1, x.shape[2]))
        return self.pre_norm(jnp.concatenate([first, x], axis=1) + self.position_embedding[...][None])


def clip_parts(config: ClipConfig, source: str, target: str) -> tuple[Part, ...]:
    """Rows of a mapping table for the tower, from names with the prefix `source` to paths with the prefix `target`."""
    patch = {"channel": config.channels, "row": config.patch_size, "col": config.patch_size}
    return (
        Part(
            source,
            target,
            pattern_sizes(config.sizes) | patch | {"position": 1 + config.num_patches},
            (
                Row("embeddings.class_embedding", "class_embedding", "e -> e"),
                *linear("embeddings.patch_embedding", "patch_embed", "e channel row col -> (channel row col) e", bias=False),
                Row("embeddings.position_embedding.weight", "position_embedding", "position e -> position e"),
                *norm("pre_layrnorm", "pre_norm", "e"),  # spelt so in all published files
            ),
        ),
        tower_layer_part(config, source, target),
    )


def clip_unused(config: ClipConfig, source: str) -> tuple[Ignored, ...]:
    """The tensors behind the features, by names with the prefix `source`, a regular expression."""
    return (
        Ignored(rf"{source}encoder\.layers\.{config.depth}\..*", "visual tokens are made of the states before the last block"),
        Ignored(rf"{source}post_layernorm\..*", "visual tokens are made of the states before this norm"),
    )
