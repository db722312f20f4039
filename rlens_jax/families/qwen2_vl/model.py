"""Qwen2-VL's vision tower with 2-D RoPE and dynamic resolution, and its 2 x 2 merger; the later families of Qwen-VL build on it.

The sizes of an image are data, not shapes of a compiled program: its patches are padded to a bucket, and their number and their
places in the image are arrays. Patches come in merge order, as Hugging Face's image processor makes them: each 4 consecutive
ones become one visual token, so padding stays at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_CHANNELS, MOST_LAYERS, MOST_PIXELS, ConfigReader
from rlens_jax.families.decoder_fields import read_decoder, rope_fields
from rlens_jax.families.siglip import TowerConfig, TowerLayer, image_groups, run_layers, run_marked
from rlens_jax.families.tower_marks import Marks, merged_marks, received_marks, with_marks
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, RMSNorm, Rotary, rotate, rotation
from rlens_jax.ops.tower_attention import attend_groups

VISION_ROPE_THETA = 10000.0
VISION_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Sizes of the tower and the merger; a patch has channels x temporal_patch x patch_size x patch_size numbers."""

    temporal_patch: int
    merge_size: int
    out_width: int

    @property
    def sizes(self) -> dict[str, int]:
        patch, group = self.channels * self.temporal_patch * self.patch_size**2, self.merge_size**2 * self.width
        return super().sizes | {"c": patch, "g": group, "m": group, "D": self.out_width}


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Everything that shapes a Qwen2-VL model."""

    decoder: DecoderConfig
    vision: VisionConfig
    image_token: int
    video_token: int


TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
"""Defaults of Qwen2VLTextConfig in transformers 5.24, and of the flat Qwen2VLConfig before 4.52."""
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "rope_theta": VISION_ROPE_THETA,
}
"""Defaults of Qwen2VLVisionConfig in transformers, the same from 4.45 to 5.24."""
TOKENS = {"image_token_id": 151655, "video_token_id": 151656}
MROPE_SECTIONS = (16, 24, 24)


def read_config(config: ConfigReader) -> Qwen2VLConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    decoder = read_qwen2_text(config, "qwen2_vl")
    vision = _read_vision(config.section("vision_config", VISION), decoder.width)
    return Qwen2VLConfig(decoder, vision, **read_tokens(config, decoder.vocabulary))


def read_tokens(config: ConfigReader, vocabulary: int) -> dict[str, int]:
    """The placeholders of images and videos, by their names in `Qwen2VLConfig`. UserError as `ConfigReader.token`."""
    tokens = ConfigReader(config.fields, config.where, TOKENS)
    return {name: tokens.token(f"{name}_id", vocabulary=vocabulary) for name in ("image_token", "video_token")}


def text_fields(config: ConfigReader, model_type: str, defaults: Mapping[str, Any]) -> tuple[ConfigReader, bool]:
    """The fields of the decoder, and whether its head is tied.

    They are those of `text_config` alone where there is one: transformers ignores the same fields beside it.
    """
    nested = config.fields.get("text_config") is not None
    text = config.section("text_config", defaults) if nested else ConfigReader(config.fields, config.where, defaults)
    text.require("model_type", f"{model_type}_text", model_type)
    # Before transformers 5 the flag was in text_config; either place ties.
    tied = [place.flag("tie_word_embeddings") for place in (config, text)]
    return text, any(tied)


def read_qwen2_text(config: ConfigReader, model_type: str) -> DecoderConfig:
    """The decoder of Qwen2-VL and Qwen2.5-VL; UserError as `read_decoder`."""
    text, tied = text_fields(config, model_type, TEXT)
    decoder = read_decoder(text, ("default", "mrope"), qkv_bias=True, tied_head=tied, rope_sections=MROPE_SECTIONS)
    if decoder.head_dim * decoder.num_heads != decoder.width:
        raise UserError(f"{text.where}: hidden_size {decoder.width} is not num_attention_heads x {decoder.head_dim}")
    return decoder


def _read_vision(vision: ConfigReader, out_width: int) -> VisionConfig:
    vision.require("model_type", "qwen2_vl_vision", "qwen2_vl")
    vision.require("hidden_act", "quick_gelu")
    vision.require("hidden_size", out_width)
    width, ratio = vision.size("embed_dim"), vision.number("mlp_ratio", most=64)
    if width * ratio < 1:
        raise vision.error("mlp_ratio", "must give the MLP a unit", ratio)
    return VisionConfig(**patch_sizes(vision, "embed_dim"), ffn_width=int(width * ratio), out_width=out_width)


def patch_sizes(vision: ConfigReader, width_name: str) -> dict[str, int]:
    """Sizes of a `vision_config` that towers with 2-D RoPE have under the same names, and their width under this name."""
    rope = rope_fields(vision)
    rope.require("rope_type", "default", "axial")
    rope.require("rope_theta", VISION_ROPE_THETA)
    width, heads = vision.size(width_name), vision.size("num_attention_heads", "num_heads")
    if width % (4 * heads):
        raise UserError(f"{vision.where}: {width_name} {width} is no multiple of 4 x num_heads, {heads}, as 2-D RoPE needs it")
    return {
        "depth": vision.size("num_hidden_layers", "depth", most=MOST_LAYERS),
        "width": width,
        "num_heads": heads,
        "channels": vision.size("in_channels", most=MOST_CHANNELS),
        "temporal_patch": vision.size("temporal_patch_size", most=MOST_CHANNELS),
        "patch_size": vision.size("patch_size", most=MOST_PIXELS),
        "merge_size": vision.size("spatial_merge_size", most=MOST_CHANNELS),
    }


States = Float[Array, "I J E"]
Groups = Int[Array, "I J"]
"""See `rlens_jax.ops.tower_attention`."""


class RotaryLayer(TowerLayer):
    """Parameters of a layer whose attention turns queries and keys by the places of their patches."""

    def mix(self, x: States, rotary: Rotary, group: Groups, most: int | None = None) -> States:
        """Add attention; `group` and `most` are those of `attend_groups`."""
        y = self.attention_norm(x)
        q, k, v = rotate(self.q_proj(y), rotary), rotate(self.k_proj(y), rotary), self.v_proj(y)
        return x + self.o_proj(attend_groups(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), group, most))


def rotary_marks(layer: Any, x: States, rotary: Rotary, group: Groups, num_patches: Int[Array | np.ndarray, " I"]) -> Marks:
    """Marks by the attention that patches receive in a `RotaryLayer` that states `x` enter; as `received_marks`."""
    y = layer.attention_norm(x)
    q, k = (rotate(project(y), rotary).swapaxes(1, 2) for project in (layer.q_proj, layer.k_proj))
    return received_marks(q, k, group, jnp.asarray(num_patches))


class VisionLayer(RotaryLayer):
    """Full attention with 2-D RoPE and a quick-GELU MLP."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.width, eps=VISION_NORM_EPS, dtype=dtype)
        super().__init__(config, norm, qkv_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: States, rotary: Rotary, group: Groups) -> States:
        x = self.mix(x, rotary, group)
        hidden = self.fc1(self.mlp_norm(x))
        return x + self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden))


def spatial_rotation(places: Int[Array | np.ndarray, "I J 2"], head_dim: int) -> Rotary:
    """The rotation by row and column of each patch: half of the frequencies follow the row, half the column."""
    quarter = head_dim // 4
    frequency = 1.0 / VISION_ROPE_THETA ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = jnp.asarray(places, jnp.float32)[..., None] * frequency[None, None, None]
    return rotation(angles.reshape(*places.shape[:2], 2 * quarter))


class VisionTower(nnx.Module):
    """Patches to visual tokens: patch embedding, stacked layers, and the merger (the connector)."""

    layer: ClassVar[Callable[..., RotaryLayer]] = VisionLayer
    norm: ClassVar[Callable[..., LayerNorm | RMSNorm]] = LayerNorm

    def __init__(self, config: Qwen2VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, sizes = config.vision, config.vision.sizes
        self.config = vision
        self.patch_embed = Linear("IJc,cE->IJE", sizes, dtype=dtype, rngs=rngs)
        make = nnx.vmap(lambda rngs: type(self).layer(vision, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(vision.depth))
        self.merger_norm = type(self).norm(vision.width, eps=VISION_NORM_EPS, dtype=dtype)
        self.merger_fc1 = Linear("IJg,gm->IJm", sizes, bias="m", dtype=dtype, rngs=rngs)
        self.merger_fc2 = Linear("IJm,mD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """States of the tower before the merger.

        Args:
            patches: flattened pixel values of each patch, in merge order; padding may hold any finite numbers.
            places: row and column of each patch in its image.
            num_patches: number of real patches of each image.
        """
        return run_layers(self.layers, *self._entering(patches, places, num_patches))

    def _entering(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> tuple[States, Rotary, Groups]:
        """States before the first layer, and what all layers share."""
        rotary = spatial_rotation(places, self.config.width // self.config.num_heads)
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        return x, rotary, image_groups(num_patches, patches.shape[1])

    def marked_features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> tuple[Float[Array, "I J E"], Marks]:
        """As `features`, and marks by the attention that patches receive in the layer before the last."""
        x, rotary, group = self._entering(patches, places, num_patches)
        marks = partial(rotary_marks, rotary=rotary, group=group, num_patches=num_patches)
        return run_marked(self.layers, self.config.depth, x, (rotary, group), marks)

    def merge(self, x: Float[Array, "I J E"]) -> Float[Array, "I Z D"]:
        """Apply the connector: merge_size ** 2 consecutive patches become one visual token."""
        images, patches, width = x.shape
        group = self.config.merge_size**2
        x = self.merger_norm(x).reshape(images, patches // group, group * width)
        return self.merger_fc2(jax.nn.gelu(self.merger_fc1(x), approximate=False))

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I Z D"]:
        """Visual tokens of each image; those of padding patches are meaningless."""
        return self.merge(self.features(patches, places, num_patches))

    def marked(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I Z D_and_marks"]:
        """The same, and the marks of each token: means over its patches."""
        x, marks = self.marked_features(patches, places, num_patches)
        return with_marks(self.merge(x), merged_marks(marks, self.config.merge_size**2))
