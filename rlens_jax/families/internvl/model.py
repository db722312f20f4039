"""InternVL's tower and connector: InternViT on square tiles of an image, pixel shuffle and an MLP.

The tower sees each tile alone, so tiles need no mask. Images are padded to a bucket of tiles.

A model folder has one of two layouts: OpenGVLab's with remote code ("native", `model_type` internvl_chat), or that of
transformers ("hf", `model_type` internvl). The code in a model folder is never run.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.errors import UserError
from rlens_jax.families.hf_files import ConfigReader, read_decoder, rope_scaling
from rlens_jax.families.siglip import TowerConfig, TowerLayer, run_layers, tower_sizes
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, RMSNorm
from rlens_jax.ops.attention import masked_attention

MERGE = 2
"""Patches per side of the square that becomes one visual token (downsample_ratio 0.5)."""
CONNECTOR_NORM_EPS = 1e-5
"""PyTorch's default, in both published codes."""
HF_QK_NORM_EPS = 1e-6
"""transformers does not read it from config.json."""
TEMPLATES = ("Hermes-2", "internlm2-chat", "internvl2_5")
"""Supported values of `template` in a native config.json."""


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Sizes and constants of InternViT and the connector."""

    image_size: int
    """Pixels per side of a tile; the learned position embedding is used at this size only."""
    rms_norm: bool
    """RMSNorm in place of LayerNorm (the 6B tower)."""
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over the queries and keys of all heads together (the 6B tower)."""
    qk_norm_eps: float
    transposed: bool
    """Visual tokens are in column order (ps_version v1), not in row order."""
    out_width: int

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return self.patches_per_side**2

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.num_patches // MERGE**2

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"g": MERGE**2 * self.width, "m": self.out_width, "D": self.out_width}


@dataclass(frozen=True)
class Native:
    """Settings of a native config.json that transformers keeps in other files."""

    min_tiles: int
    max_tiles: int
    thumbnail: bool
    template: str
    """One of `TEMPLATES`."""


@dataclass(frozen=True)
class InternVLConfig:
    """Everything that shapes an InternVL model."""

    decoder: DecoderConfig
    vision: VisionConfig
    text_model: str
    """`model_type` of the text model: qwen2, llama or internlm2."""
    image_token: int | None
    """Only in the layout of transformers; otherwise the tokenizer has it."""
    max_tokens: int | None
    """The longest prompt that dynamic NTK scaling of RoPE does not change; None without scaling."""
    native: Native | None
    """None in the layout of transformers."""


def read_native_config(config: ConfigReader) -> InternVLConfig:
    """Read the sizes from config.json of the native layout; missing fields have the defaults of OpenGVLab's code.

    Raises:
        UserError: a field asks for a computation that is not supported, or one without default is missing.
    """
    config.require("select_layer", -1)
    config.require("downsample_ratio", 0.5)
    config.require("ps_version", "v1", "v2")
    vision, text = config.section("vision_config"), config.section("llm_config")
    vision.require("qkv_bias", False, True)
    vision.require("qk_normalization", True, False)
    vision.require("norm_type", "rms_norm", "layer_norm")
    image_size = _square(vision, "image_size")
    config.require("force_image_size", image_size, None)
    template = config.fields.get("template")
    if template not in TEMPLATES:
        supported = ", ".join(TEMPLATES)
        raise UserError(f"{config.where}: template {template!r} is not supported (only {supported})")
    decoder = _read_text_decoder(text, tied_head=bool(text.fields.get("tie_word_embeddings", False)))
    least, most = config.size("min_dynamic_patch", default=1), config.size("max_dynamic_patch", default=6)
    if least > most:
        raise UserError(f"{config.where}: min_dynamic_patch {least} is larger than max_dynamic_patch {most}")
    several = bool(config.fields.get("dynamic_image_size", False))
    return InternVLConfig(
        decoder,
        _read_vision(
            vision,
            rms_norm=vision.fields.get("norm_type", "rms_norm") == "rms_norm",
            qkv_bias=vision.fields.get("qkv_bias", False),
            qk_norm=vision.fields.get("qk_normalization", True),
            qk_norm_eps=vision.number("layer_norm_eps", default=1e-6),
            transposed=config.fields.get("ps_version", "v1") == "v1",
            out_width=decoder.width,
        ),
        text_model=text.fields["model_type"],
        image_token=None,
        max_tokens=_rope_limit(text),
        native=Native(
            min_tiles=least if several else 1,
            max_tiles=most if several else 1,
            thumbnail=bool(config.fields.get("use_thumbnail", False)),
            template=template,
        ),
    )


def read_hf_config(config: ConfigReader) -> InternVLConfig:
    """Read the sizes from config.json of the layout of transformers, with its defaults; UserError as `read_native_config`."""
    config.require("vision_feature_layer", -1)
    config.require("vision_feature_select_strategy", "default")
    config.require("projector_hidden_act", "gelu")
    config.require("downsample_ratio", 0.5)
    vision, text = config.section("vision_config"), config.section("text_config")
    vision.require("attention_bias", False, True)
    vision.require("use_qk_norm", False, True)
    vision.require("norm_type", "layer_norm", "rms_norm")
    vision.require("use_absolute_position_embeddings", True)
    vision.require("use_mask_token", False)
    vision.require("use_mean_pooling", True)
    # In transformers the outer field, where present, overrides the inner one.
    tied = config.fields.get("tie_word_embeddings", text.fields.get("tie_word_embeddings", False))
    decoder = _read_text_decoder(text, tied_head=bool(tied))
    return InternVLConfig(
        decoder,
        _read_vision(
            vision,
            rms_norm=vision.fields.get("norm_type") == "rms_norm",
            qkv_bias=vision.fields.get("attention_bias", False),
            qk_norm=vision.fields.get("use_qk_norm", False),
            qk_norm_eps=HF_QK_NORM_EPS,
            transposed=False,
            out_width=decoder.width,
        ),
        text_model=text.fields["model_type"],
        image_token=config.size("image_token_id"),
        max_tokens=_rope_limit(text),
        native=None,
    )


def _read_text_decoder(text: ConfigReader, tied_head: bool) -> DecoderConfig:
    """Read the sizes of a text model by its `model_type`: Qwen2, Llama or InternLM2 (a Llama with fused q, k, v).

    Dynamic NTK scaling of RoPE is accepted, because its factor is 1 up to `max_position_embeddings`. Prompts beyond
    `_rope_limit` must be refused. The caller reads `tied_head`, because the layouts store it in different places.

    Raises:
        UserError: the text model is another one, or a field is missing or asks for what is not supported.
    """
    model_type = text.fields.get("model_type")
    without_bias = {"qwen2": (), "llama": ("attention_bias", "mlp_bias"), "internlm2": ("bias",)}
    if model_type not in without_bias:
        supported = ", ".join(without_bias)
        raise UserError(f"{text.where}: model_type {model_type!r} is not supported; text models are: {supported}")
    for name in without_bias[model_type]:
        text.require(name, False)
    return read_decoder(text, ("default", "dynamic"), default_theta=None, qkv_bias=model_type == "qwen2", tied_head=tied_head)


def _rope_limit(text: ConfigReader) -> int | None:
    """The longest prompt that dynamic NTK scaling of RoPE does not change; None without scaling."""
    scaling = rope_scaling(text)
    if "dynamic" in (scaling.get("type"), scaling.get("rope_type")):
        return text.size("max_position_embeddings")
    return None


def _square(config: ConfigReader, name: str) -> int:
    """A side in pixels, written as one number or as two equal ones."""
    value = config.fields.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return ConfigReader({name: value[0]}, config.where).size(name)
    if isinstance(value, list):
        raise UserError(f"{config.where}: {name} = {value} is not supported (only squares)")
    return config.size(name)


def _read_vision(
    vision: ConfigReader, *, rms_norm: bool, qkv_bias: bool, qk_norm: bool, qk_norm_eps: float, transposed: bool, out_width: int
) -> VisionConfig:
    vision.require("hidden_act", "gelu")
    image_size, patch_size = _square(vision, "image_size"), _square(vision, "patch_size")
    if image_size % (MERGE * patch_size):
        raise UserError(f"{vision.where}: image_size {image_size} is no multiple of {MERGE} x {patch_size}")
    return VisionConfig(
        **tower_sizes(vision),
        patch_size=patch_size,
        image_size=image_size,
        rms_norm=rms_norm,
        norm_eps=vision.number("layer_norm_eps", default=1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        qk_norm_eps=qk_norm_eps,
        transposed=transposed,
        out_width=out_width,
    )


class VisionLayer(TowerLayer):
    """Full attention within one tile and a GELU MLP, each scaled per channel (LayerScale)."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(RMSNorm if config.rms_norm else LayerNorm, config.width, eps=config.norm_eps, dtype=dtype)
        super().__init__(config, norm, qkv_bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        qk_norm = [RMSNorm(config.width, eps=config.qk_norm_eps, dtype=dtype) if config.qk_norm else None for _ in range(2)]
        self.q_norm, self.k_norm = qk_norm
        self.attention_scale = nnx.Param(jnp.ones(config.width, dtype))
        self.mlp_scale = nnx.Param(jnp.ones(config.width, dtype))

    def __call__(self, x: Float[Array, "I J E"]) -> Float[Array, "I J E"]:
        y = self.attention_norm(x)
        q, k, v = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.reshape(x.shape)), self.k_norm(k.reshape(x.shape))
        q, k, v = (z.reshape(v.shape).swapaxes(1, 2) for z in (q, k, v))
        mask = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
        x = x + self.o_proj(masked_attention(q, k, v, mask)) * self.attention_scale[...][None, None]
        hidden = jax.nn.gelu(self.fc1(self.mlp_norm(x)), approximate=False)
        return x + self.fc2(hidden) * self.mlp_scale[...][None, None]


class VisionTower(nnx.Module):
    """Tiles to visual tokens: InternViT, and the connector (pixel shuffle and MLP)."""

    def __init__(self, config: InternVLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, sizes, scale = config.vision, config.vision.sizes, jnp.asarray(0.02, dtype)
        self.config = vision
        self.patch_embed = Linear("IJc,cE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (vision.width,), dtype) * scale)
        shape = (1 + vision.num_patches, vision.width)
        self.position = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)
        make = nnx.vmap(lambda rngs: VisionLayer(vision, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(vision.depth))
        self.connector_norm = LayerNorm(sizes["g"], eps=CONNECTOR_NORM_EPS, dtype=dtype)
        self.connector_fc1 = Linear("IJg,gm->IJm", sizes, bias="m", dtype=dtype, rngs=rngs)
        self.connector_fc2 = Linear("IJm,mD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def features(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J_and_class E"]:
        """States of InternViT for I tiles: the class token, then the patches row by row."""
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        first = jnp.broadcast_to(self.class_token[...][None, None], (x.shape[0], 1, x.shape[2]))
        return run_layers(self.layers, jnp.concatenate([first, x], axis=1) + self.position[...][None])

    def merge(self, x: Float[Array, "I J_and_class E"]) -> Float[Array, "I Z D"]:
        """Apply the connector: 2 x 2 patches become one visual token; the class token is dropped."""
        side = self.config.patches_per_side
        order = "j i" if self.config.transposed else "i j"
        sides = {"i": side // MERGE, "j": side // MERGE, "a": MERGE, "b": MERGE}
        x = self.connector_norm(rearrange(x[:, 1:], f"I (i a j b) E -> I ({order}) (a b E)", **sides))
        return self.connector_fc2(jax.nn.gelu(self.connector_fc1(x), approximate=False))

    def __call__(self, patches: Float[Array | np.ndarray, "I v J c"]) -> Float[Array, "I Z D"]:
        """Visual tokens of each image, tile by tile; those of padding tiles are meaningless.

        One image at a time: the attention scores of all tiles of a batch would not fit in memory.
        """

        def image(tiles: Array) -> Array:
            return self.merge(self.features(tiles)).reshape(-1, self.config.out_width)

        return jax.lax.map(image, jnp.asarray(patches))
