"""Qwen3-VL's vision tower and mergers: learned positions that are interpolated, and features for deepstack.

Patches, their places and their order are those of Qwen2-VL. A visual token has its embedding, and behind it the features that the
decoder adds to it after its first layers.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import isqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import QWEN3, read_qwen3_decoder
from rlens_jax.families.qwen2_vl.model import (
    VISION_NORM_EPS,
    VISION_ROPE_THETA,
    Qwen2VLConfig,
    RotaryLayer,
    patch_sizes,
    read_tokens,
    rotary_marks,
    spatial_rotation,
    text_fields,
)
from rlens_jax.families.qwen2_vl.model import VisionConfig as Qwen2VisionConfig
from rlens_jax.families.siglip import image_groups, run_span
from rlens_jax.families.tower_marks import Marks, marked_layer, merged_marks, tower_layer, with_marks
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, Rotary

TEXT = {**QWEN3, "max_position_embeddings": 128000, "rope_theta": 500000.0}
"""Defaults of Qwen3VLTextConfig in transformers, the same from 4.57 to 5.24."""
VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
    "rope_theta": VISION_ROPE_THETA,
}
"""Defaults of Qwen3VLVisionConfig in transformers, the same from 4.57 to 5.24."""
DEEPSTACK = "deepstack_visual_indexes"
MROPE_SECTIONS = (24, 20, 20)


@dataclass(frozen=True)
class VisionConfig(Qwen2VisionConfig):
    """Sizes of the tower and the mergers."""

    positions_per_side: int
    """Rows and columns of the square table of positions."""
    deepstack: tuple[int, ...]
    """Blocks whose outputs become features of the visual tokens, ascending."""

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"p": self.positions_per_side**2}


@dataclass(frozen=True)
class Qwen3VLConfig(Qwen2VLConfig):
    """Everything that shapes a Qwen3-VL model."""

    vision: VisionConfig


def read_config(config: ConfigReader) -> Qwen3VLConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    config.section("text_config")
    text, tied = text_fields(config, "qwen3_vl", TEXT)
    vision = config.section("vision_config", VISION)
    deepstack = _read_deepstack(vision)
    decoder = read_qwen3_decoder(text, ("default", "mrope"), tied_head=tied, rope_sections=MROPE_SECTIONS)
    decoder = replace(decoder, deepstack=len(deepstack))
    if decoder.deepstack >= decoder.num_layers:
        raise vision.error(DEEPSTACK, f"must be fewer than the decoder's layers, {decoder.num_layers}", list(deepstack))
    return Qwen3VLConfig(decoder, _read_vision(vision, decoder, deepstack), **read_tokens(config, decoder.vocabulary))


def _read_vision(vision: ConfigReader, decoder: DecoderConfig, deepstack: tuple[int, ...]) -> VisionConfig:
    # Files before transformers 5 have the model's own type here.
    vision.require("model_type", "qwen3_vl_vision", "qwen3_vl")
    vision.require("hidden_act", "gelu_pytorch_tanh")
    vision.require("out_hidden_size", decoder.width)
    positions = vision.size("num_position_embeddings")
    if isqrt(positions) ** 2 != positions:
        raise vision.error("num_position_embeddings", "must be a square number", positions)
    sizes = patch_sizes(vision, "hidden_size")
    if deepstack[-1:] >= (sizes["depth"],):
        raise vision.error(DEEPSTACK, f"must be below the tower's depth, {sizes['depth']}", list(deepstack))
    return VisionConfig(
        **sizes,
        ffn_width=vision.size("intermediate_size"),
        out_width=decoder.width,
        positions_per_side=isqrt(positions),
        deepstack=deepstack,
    )


def _read_deepstack(vision: ConfigReader) -> tuple[int, ...]:
    value = vision.fields.get(DEEPSTACK, vision.defaults[DEEPSTACK])
    numbers = isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
    if not numbers or sorted(set(value)) != value:
        raise vision.error(DEEPSTACK, "must be numbers of the tower's blocks, ascending", value)
    return tuple(value)


class VisionLayer(RotaryLayer):
    """Full attention with 2-D RoPE and a GELU MLP (by tanh)."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.width, eps=VISION_NORM_EPS, dtype=dtype)
        super().__init__(config, norm, qkv_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "I J E"], rotary: Rotary, group: Int[Array, "I J"]) -> Float[Array, "I J E"]:
        x = self.mix(x, rotary, group)
        return x + self.fc2(jax.nn.gelu(self.fc1(self.mlp_norm(x)), approximate=True))


class Merger(nnx.Module):
    """merge_size ** 2 consecutive patches to one vector of the decoder's width: a norm and a GELU MLP.

    The norm is over each patch, or over all patches of the vector together (`grouped`).
    """

    def __init__(self, config: VisionConfig, *, grouped: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = config.sizes
        self.grouped, self.group = grouped, config.merge_size**2
        self.norm = LayerNorm(sizes["g"] if grouped else config.width, eps=VISION_NORM_EPS, dtype=dtype)
        self.fc1 = Linear("IJg,gm->IJm", sizes, bias="m", dtype=dtype, rngs=rngs)
        self.fc2 = Linear("IJm,mD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "I J E"]) -> Float[Array, "I Z D"]:
        images, patches, width = x.shape
        x = x if self.grouped else self.norm(x)
        x = x.reshape(images, patches // self.group, self.group * width)
        x = self.norm(x) if self.grouped else x
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches to visual tokens: patch and position embeddings, stacked layers, and the mergers (the connector)."""

    def __init__(self, config: Qwen3VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision = config.vision
        self.config = vision
        self.patch_embed = Linear("IJc,cE->IJE", vision.sizes, bias="E", dtype=dtype, rngs=rngs)
        shape = vision.positions_per_side**2, vision.width
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(0.02, dtype))
        self.layers = nnx.vmap(lambda rngs: VisionLayer(vision, dtype=dtype, rngs=rngs))(rngs.split(vision.depth))
        self.merger = Merger(vision, grouped=False, dtype=dtype, rngs=rngs)
        self.deepstack = nnx.List(Merger(vision, grouped=True, dtype=dtype, rngs=rngs) for _ in vision.deepstack)

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> list[Float[Array, "I J E"]]:
        """States after each block with deepstack, and after the last block; those of padding are meaningless.

        Args:
            patches: flattened pixel values of each patch, in merge order; padding may hold any finite numbers.
            places: row and column of each patch in its image.
            num_patches: number of real patches of each image.
        """
        return self._features(patches, places, num_patches, marks=False)[0]

    def _features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
        *,
        marks: bool,
    ) -> tuple[list[Float[Array, "I J E"]], Marks | None]:
        """`features`, and marks by the attention that patches receive in the block before the last."""
        vision, made = self.config, None
        group = image_groups(num_patches, patches.shape[1])
        rotary = spatial_rotation(places, vision.width // vision.num_heads)
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        x = x + interpolated(self.position_embedding[...], jnp.asarray(places), group == 0, vision.positions_per_side)
        states, first, number = [], 0, marked_layer(vision.depth)
        for after in (*(block + 1 for block in vision.deepstack), vision.depth):
            if marks and first <= number < after:
                x = run_span(self.layers, first, number - first, x, rotary, group)
                layer, first = tower_layer(self.layers, number), number
                made = rotary_marks(layer, x, rotary, group, num_patches)
            x = run_span(self.layers, first, after - first, x, rotary, group)
            states.append(x)
            first = after
        return states, made

    def merge(self, states: list[Float[Array, "I J E"]]) -> Float[Array, "I Z visual_width"]:
        """Apply the connector to `features`: of each visual token the embedding, and then the features for the decoder."""
        *earlier, last = states
        features = [merger(x) for merger, x in zip(self.deepstack, earlier, strict=True)]
        return jnp.concatenate([self.merger(last), *features], axis=-1)

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I Z visual_width"]:
        """Visual tokens of each image; those of padding patches are meaningless."""
        return self.merge(self.features(patches, places, num_patches))

    def marked(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I Z visual_width_and_marks"]:
        """The same, and the marks of each token: means over its patches."""
        states, marks = self._features(patches, places, num_patches, marks=True)
        assert marks is not None
        return with_marks(self.merge(states), merged_marks(marks, self.config.merge_size**2))


def interpolated(
    table: Float[Array, "positions E"], places: Int[Array, "I J 2"], is_patch: Bool[Array, "I J"], side: int
) -> Float[Array, "I J E"]:
    """The position embedding of each patch: the square table, bilinearly interpolated to the image's rows and columns of patches.

    The corners of table and image coincide. Weights are float32.
    """
    rows, columns = (_corners(places[..., axis], is_patch, side) for axis in (0, 1))
    total = jnp.zeros((*is_patch.shape, table.shape[1]), jnp.float32)
    for row, of_row in rows:
        for column, of_column in columns:
            total += table[row * side + column].astype(jnp.float32) * (of_row * of_column)[..., None]
    return total.astype(table.dtype)


def _corners(
    place: Int[Array, "I J"], is_patch: Bool[Array, "I J"], side: int
) -> list[tuple[Int[Array, "I J"], Float[Array, "I J"]]]:
    """Along one axis, the rows of the table on both sides of each patch, and their weights."""
    last = jnp.where(is_patch, place, 0).max(axis=1, keepdims=True)
    at = jnp.where(is_patch, place, 0).astype(jnp.float32) * (side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
    low = jnp.floor(at)
    first = low.astype(jnp.int32)
    return [(first, 1 - (at - low)), (jnp.minimum(first + 1, side - 1), at - low)]
