"""InternVL's tower and connector: InternViT on square tiles of an image, pixel shuffle and an MLP.

The tower sees each tile alone, so tiles need no mask. Images are padded to a bucket of tiles.

A model folder has one of two layouts: OpenGVLab's with remote code ("native", `model_type` internvl_chat), or that of
transformers ("hf", `model_type` internvl). The code in a model folder is never run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_PIXELS, MOST_TOKENS, ConfigReader
from rlens_jax.families.decoder_fields import LLAMA, QWEN2, QWEN3, read_decoder, rope_fields
from rlens_jax.families.siglip import TowerConfig, TowerLayer, run_layers, run_marked, tower_sizes
from rlens_jax.families.tower_marks import Marks, class_token_marks, with_marks
from rlens_jax.files import quoted
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, RMSNorm
from rlens_jax.ops.tower_attention import attend_groups

MERGE = 2
"""Patches per side of the square that becomes one visual token (downsample_ratio 0.5)."""
CONNECTOR_NORM_EPS = 1e-5
"""PyTorch's default, in both published codes."""
NO_FLASH = "compresses visual tokens and is not supported; use InternVL3_5-8B"
HF_QK_NORM_EPS = 1e-6
"""transformers does not read it from config.json."""
TEMPLATES = ("Hermes-2", "internlm2-chat", "internvl2_5")
"""Supported values of `template` in a native config.json."""
INTERNLM2 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bias": True,
}
"""Defaults of InternLM2Config in the published code; that of its vocabulary differs between copies."""
TEXT = {"qwen2": QWEN2, "qwen3": QWEN3, "llama": LLAMA, "internlm2": INTERNLM2}
"""Defaults of the text models by their `model_type`."""
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
}
"""Classes by which OpenGVLab's code chooses the text model."""
HF_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
}
"""Defaults of InternVLVisionConfig in transformers, the same from 4.52 to 5.24."""
NATIVE_VISION = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "qkv_bias": False,
    "qk_normalization": True,
    "intermediate_size": 12800,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
}
"""Defaults of InternVisionConfig in the published code (the 6B tower)."""


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
    """`model_type` of the text model, one of those in `TEXT`."""
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
    if config.fields.get("flash_mode"):
        raise UserError(f"{config.where}: InternVL3.5-Flash {NO_FLASH}")
    config.require("select_layer", -1)
    config.require("downsample_ratio", 0.5)
    vision, text = config.section("vision_config", NATIVE_VISION), _text_section(config, "llm_config", None)
    text.require("architectures", [ARCHITECTURES[text.fields["model_type"]]], None)
    image_size = _square(vision, "image_size")
    config.require("force_image_size", image_size, None)
    template = config.fields.get("template")
    if template not in TEMPLATES:
        supported = ", ".join(TEMPLATES)
        raise UserError(f"{config.where}: template {quoted(template)} is not supported (only {supported})")
    decoder = _read_text_decoder(config, text)
    least, most = config.size("min_dynamic_patch", default=1), config.size("max_dynamic_patch", default=6)
    if least > most:
        raise UserError(f"{config.where}: min_dynamic_patch {least} is larger than max_dynamic_patch {most}")
    several = config.flag("dynamic_image_size")
    return InternVLConfig(
        decoder,
        _read_vision(
            vision,
            rms_norm=vision.require("norm_type", "rms_norm", "layer_norm") == "rms_norm",
            qkv_bias=vision.flag("qkv_bias"),
            qk_norm=vision.flag("qk_normalization"),
            qk_norm_eps=vision.number("layer_norm_eps", most=1),
            transposed=config.require("ps_version", "v1", "v2") == "v1",
            out_width=decoder.width,
        ),
        text_model=text.fields["model_type"],
        image_token=None,
        max_tokens=_rope_limit(text),
        native=Native(
            min_tiles=least if several else 1,
            max_tiles=most if several else 1,
            thumbnail=config.flag("use_thumbnail"),
            template=template,
        ),
    )


def read_hf_config(config: ConfigReader) -> InternVLConfig:
    """Read the sizes from config.json of the layout of transformers, with its defaults; UserError as `read_native_config`."""
    config.require("vision_feature_layer", -1)
    config.require("vision_feature_select_strategy", "default")
    config.require("projector_hidden_act", "gelu")
    config.require("downsample_ratio", 0.5)
    config = ConfigReader(config.fields, config.where, {"image_token_id": 151667})
    vision, text = config.section("vision_config", HF_VISION), _text_section(config, "text_config", "qwen2")
    vision.require("use_absolute_position_embeddings", True)
    vision.require("use_mask_token", False)
    vision.require("use_mean_pooling", True)
    decoder = _read_text_decoder(config, text)
    return InternVLConfig(
        decoder,
        _read_vision(
            vision,
            rms_norm=vision.require("norm_type", "layer_norm", "rms_norm") == "rms_norm",
            qkv_bias=vision.flag("attention_bias"),
            qk_norm=vision.flag("use_qk_norm"),
            qk_norm_eps=HF_QK_NORM_EPS,
            transposed=False,
            out_width=decoder.width,
        ),
        text_model=text.fields.get("model_type", "qwen2"),
        image_token=config.token("image_token_id", vocabulary=decoder.vocabulary),
        max_tokens=_rope_limit(text),
        native=None,
    )


def _text_section(config: ConfigReader, name: str, default: str | None) -> ConfigReader:
    """The fields of the text model, with the defaults of its class; UserError if it is another one than those of `TEXT`."""
    text = config.section(name)
    model_type = text.fields.get("model_type", default)
    if not isinstance(model_type, str) or model_type not in TEXT:
        supported = ", ".join(TEXT)
        raise UserError(f"{text.where}: model_type {quoted(model_type)} is not supported; text models are: {supported}")
    return ConfigReader(text.fields, text.where, TEXT[model_type])


def _read_text_decoder(config: ConfigReader, text: ConfigReader) -> DecoderConfig:
    """Read the sizes of a text model: Qwen2, Qwen3, Llama or InternLM2 (a Llama with fused q, k, v).

    Dynamic NTK scaling of RoPE is accepted, because its factor is 1 up to `max_position_embeddings`. Prompts beyond
    `_rope_limit` must be refused. The head is tied if either place says so.

    Raises:
        UserError: a field is missing or asks for what is not supported.
    """
    for name in ("attention_bias", "mlp_bias", "bias"):
        if name in text.defaults:
            text.require(name, False)
    tied = [place.flag("tie_word_embeddings") for place in (config, text)]
    biased, normed = (text.defaults is known for known in (QWEN2, QWEN3))
    return read_decoder(text, ("default", "dynamic"), qkv_bias=biased, qk_norm=normed, tied_head=any(tied))


def _rope_limit(text: ConfigReader) -> int | None:
    """The longest prompt that dynamic NTK scaling of RoPE does not change; None without scaling."""
    dynamic = rope_fields(text).require("rope_type", "default", "dynamic") == "dynamic"
    return text.size("max_position_embeddings", most=MOST_TOKENS) if dynamic else None


def _square(config: ConfigReader, name: str) -> int:
    """A side in pixels, written as one number or as two equal ones."""
    value = config.fields.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return ConfigReader({name: value[0]}, config.where).size(name, most=MOST_PIXELS)
    if isinstance(value, list):
        raise UserError(f"{config.where}: {name} = {quoted(value)} is not supported (only squares)")
    return config.size(name, most=MOST_PIXELS)


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
        norm_eps=vision.number("layer_norm_eps", most=1),
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

    def queries(self, y: Float[Array, "I T E"]) -> Float[Array, "I N T H"]:
        """Queries of normed states."""
        q = self.q_proj(y)
        return (q if self.q_norm is None else self.q_norm(q.reshape(y.shape)).reshape(q.shape)).swapaxes(1, 2)

    def keys(self, y: Float[Array, "I T E"]) -> Float[Array, "I N T H"]:
        """Keys of normed states."""
        k = self.k_proj(y)
        return (k if self.k_norm is None else self.k_norm(k.reshape(y.shape)).reshape(k.shape)).swapaxes(1, 2)

    def __call__(self, x: Float[Array, "I J E"]) -> Float[Array, "I J E"]:
        y = self.attention_norm(x)
        q, k, v = self.queries(y), self.keys(y), self.v_proj(y).swapaxes(1, 2)
        attended = attend_groups(q, k, v, jnp.zeros(x.shape[:2], jnp.int32))
        x = x + self.o_proj(attended) * self.attention_scale[...][None, None]
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
        return run_layers(self.layers, self._entering(patches))

    def _entering(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[Array, "I J_and_class E"]:
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        first = jnp.broadcast_to(self.class_token[...][None, None], (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([first, x], axis=1) + self.position[...][None]

    def merge(self, x: Float[Array, "I J_and_class E"]) -> Float[Array, "I Z D"]:
        """Apply the connector: 2 x 2 patches become one visual token; the class token is dropped."""
        x = self.connector_norm(rearrange(self._fours(x[:, 1:]), "I Z four E -> I Z (four E)"))
        return self.connector_fc2(jax.nn.gelu(self.connector_fc1(x), approximate=False))

    def __call__(self, patches: Float[Array | np.ndarray, "I v J c"]) -> Float[Array, "I Z D"]:
        """Visual tokens of each image, tile by tile; those of padding tiles are meaningless.

        One image at a time: a batch of many tiles would take much memory.
        """

        def image(tiles: Array) -> Array:
            return self.merge(self.features(tiles)).reshape(-1, self.config.out_width)

        return jax.lax.map(image, jnp.asarray(patches))

    def marked(self, patches: Float[Array | np.ndarray, "I v J c"]) -> Float[Array, "I Z D_and_marks"]:
        """The same, and the marks of each token: by the class token's attention, means over its four patches."""

        def marks(layer: Any, x: Array) -> Marks:
            y = layer.attention_norm(x)
            return class_token_marks(layer.queries(y[:, :1]), layer.keys(y))

        def image(tiles: Array) -> Array:
            x, made = run_marked(self.layers, self.config.depth, self._entering(tiles), (), marks)
            tokens = with_marks(self.merge(x), self._fours(made).mean(axis=2))
            return tokens.reshape(-1, tokens.shape[-1])

        return jax.lax.map(image, jnp.asarray(patches))

    def _fours(self, x: Float[Array, "I J numbers"]) -> Float[Array, "I Z four numbers"]:
        """The four patches of each visual token, row by row, from all patches row by row."""
        side = self.config.patches_per_side // MERGE
        order = "j i" if self.config.transposed else "i j"
        return rearrange(x, f"I (i a j b) E -> I ({order}) (a b) E", i=side, j=side, a=MERGE, b=MERGE)
