"""InternVL2, 2.5 and 3 (arXiv 2404.16821, 2412.05271, 2504.10479): InternViT on tiles, pixel shuffle, MLP, plain RoPE.

An image becomes a grid of square tiles of one size and, if there are several, a thumbnail of the whole. The tower sees each
tile alone, so tiles need no mask; the tokens of all tiles of an image are one run in the prompt. Images are padded
to a bucket of tiles.

Two layouts of a model folder are read: the one OpenGVLab publishes with remote code ("native", `model_type`
internvl_chat) and the one of transformers ("hf", `model_type` internvl). No code of a model folder is ever run.

Axis letters: I images or tiles, Y tiles of an image (padded), J patches of a tile, C numbers of a patch, E tower width,
N heads, H head dim, F MLP width, G numbers of 2 x 2 patches, D decoder width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree
from PIL.Image import Image, Resampling

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import ConfigReader, read_decoder, rope_scaling
from rlens_jax.families.tokenizer_files import load_tokenizer
from rlens_jax.models.chat import ChatTokenizer
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, RMSNorm
from rlens_jax.models.prompt import PreparedImage, Prompt
from rlens_jax.ops.attention import masked_attention

MERGE = 2
"""Side of the square of patches that becomes one visual token (downsample_ratio 0.5)."""
CONNECTOR_NORM_EPS = 1e-5
"""Both published codes leave it at PyTorch's default."""
HF_QK_NORM_EPS = 1e-6
"""transformers does not take it from config.json."""
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

IMAGE_TOKEN, IMAGE_START, IMAGE_END, TURN_END = "<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>"
VIDEO_MARK = "<video>"
SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
TEMPLATES = {
    "Hermes-2": (SYSTEM_2, TURN_END),
    "internlm2-chat": (SYSTEM_2, TURN_END),
    "internvl2_5": (SYSTEM_2_5, TURN_END + "\n"),
}
"""System prompt and end of a turn by the `template` of a native config.json (from conversation.py, OpenGVLab/InternVL)."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of InternViT and the connector."""

    depth: int
    width: int
    num_heads: int
    ffn_width: int
    channels: int
    image_size: int
    """Side of a tile in pixels; the learned position embedding is used at this size only."""
    patch_size: int
    rms_norm: bool
    """RMSNorm in place of LayerNorm (the 6B tower)."""
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm over all heads' queries and keys (the 6B tower)."""
    qk_norm_eps: float
    transposed: bool
    """Visual tokens go column by column (ps_version v1), not row by row."""
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
        return {
            "C": self.channels * self.patch_size**2,
            "E": self.width,
            "N": self.num_heads,
            "H": self.width // self.num_heads,
            "F": self.ffn_width,
            "G": MERGE**2 * self.width,
            "M": self.out_width,
            "D": self.out_width,
        }


@dataclass(frozen=True)
class Native:
    """What a native config.json says and transformers keeps in other files."""

    min_tiles: int
    max_tiles: int
    thumbnail: bool
    template: str
    """A key of `TEMPLATES`."""


@dataclass(frozen=True)
class InternVLConfig:
    """Everything that shapes an InternVL model."""

    decoder: DecoderConfig
    vision: VisionConfig
    text_model: str
    """model_type of the text model: qwen2, llama or internlm2."""
    image_token: int | None
    """Only in the layout of transformers; in any case it is the tokenizer's `IMAGE_TOKEN`."""
    max_tokens: int | None
    """Longest prompt for which RoPE is plain (dynamic NTK scaling acts beyond it)."""
    native: Native | None
    """None: the layout of transformers."""


def read_native_config(config: ConfigReader) -> InternVLConfig:
    """Sizes from config.json of the native layout; what it leaves out has the defaults of OpenGVLab's code.

    Raises:
        UserError: a field is missing, or asks for a computation that is not supported.
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
    """Sizes from config.json of the layout of transformers, whose defaults stand in for what it leaves out.

    Raises:
        UserError: a field is missing, or asks for a computation that is not supported.
    """
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
    # transformers ties by the outer field where it is written, whatever the inner one says.
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
    """A nested text model's sizes by its own `model_type`: Qwen2, Llama or InternLM2 (a Llama with fused q, k, v).

    Dynamic NTK scaling of RoPE is accepted, because its factor is 1 up to `max_position_embeddings`: whoever
    accepts longer prompts than `_rope_limit` says computes something else.

    Args:
        text: the nested fields.
        tied_head: where that is said differs between layouts.

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
    return read_decoder(
        text, ("default", "dynamic"), default_theta=None, qkv_bias=model_type == "qwen2", tied_head=tied_head
    )


def _rope_limit(text: ConfigReader) -> int | None:
    """Up to how many tokens a text model with dynamic NTK scaling is one with plain RoPE; None without scaling."""
    scaling = rope_scaling(text)
    if "dynamic" in (scaling.get("type"), scaling.get("rope_type")):
        return text.size("max_position_embeddings")
    return None


def _square(config: ConfigReader, name: str) -> int:
    """A side in pixels, given once or as two equal numbers."""
    value = config.fields.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return ConfigReader({name: value[0]}, config.where).size(name)
    if isinstance(value, list):
        raise UserError(f"{config.where}: {name} = {value} is not supported (only squares)")
    return config.size(name)


def _read_vision(
    vision: ConfigReader,
    *,
    rms_norm: bool,
    qkv_bias: bool,
    qk_norm: bool,
    qk_norm_eps: float,
    transposed: bool,
    out_width: int,
) -> VisionConfig:
    vision.require("hidden_act", "gelu")
    image_size, patch_size = _square(vision, "image_size"), _square(vision, "patch_size")
    if image_size % (MERGE * patch_size):
        raise UserError(f"{vision.where}: image_size {image_size} is no multiple of {MERGE} x {patch_size}")
    return VisionConfig(
        depth=vision.size("num_hidden_layers"),
        width=vision.size("hidden_size"),
        num_heads=vision.size("num_attention_heads"),
        ffn_width=vision.size("intermediate_size"),
        channels=vision.size("num_channels", default=3),
        image_size=image_size,
        patch_size=patch_size,
        rms_norm=rms_norm,
        norm_eps=vision.number("layer_norm_eps", default=1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        qk_norm_eps=qk_norm_eps,
        transposed=transposed,
        out_width=out_width,
    )


def _norm(config: VisionConfig, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    kind = RMSNorm if config.rms_norm else LayerNorm
    return kind(config.width, eps=config.norm_eps, dtype=dtype)


class VisionLayer(nnx.Module):
    """Pre-norm full attention within one tile and a GELU MLP, each output scaled by channel (LayerScale)."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, bias = config.sizes, "NH" if config.qkv_bias else ""
        self.attention_norm = _norm(config, dtype)
        self.q_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        qk_norm = [
            RMSNorm(config.width, eps=config.qk_norm_eps, dtype=dtype) if config.qk_norm else None for _ in range(2)
        ]
        self.q_norm, self.k_norm = qk_norm
        self.o_proj = Linear("INJH,NHE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.attention_scale = nnx.Param(jnp.ones(config.width, dtype))
        self.mlp_norm = _norm(config, dtype)
        self.fc1 = Linear("IJE,EF->IJF", sizes, bias="F", dtype=dtype, rngs=rngs)
        self.fc2 = Linear("IJF,FE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
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

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, scale = config.sizes, jnp.asarray(0.02, dtype)
        self.config = config
        self.patch_embed = Linear("IJC,CE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (config.width,), dtype) * scale)
        shape = (1 + config.num_patches, config.width)
        self.position = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)
        make = nnx.vmap(lambda rngs: VisionLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.depth))
        self.connector_norm = LayerNorm(sizes["G"], eps=CONNECTOR_NORM_EPS, dtype=dtype)
        self.connector_fc1 = Linear("IJG,GM->IJM", sizes, bias="M", dtype=dtype, rngs=rngs)
        self.connector_fc2 = Linear("IJM,MD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def features(self, patches: Float[Array | np.ndarray, "I J C"]) -> Float[Array, "I J_and_class E"]:
        """InternViT's output for some tiles, the class token first; patches are row by row."""
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        first = jnp.broadcast_to(self.class_token[...][None, None], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.position[...][None]
        graph, stack = nnx.split(self.layers)

        def body(x: Array, layer: PyTree) -> tuple[Array, None]:
            return nnx.merge(graph, layer)(x), None

        return jax.lax.scan(body, x, stack)[0]

    def merge(self, x: Float[Array, "I J_and_class E"]) -> Float[Array, "I j D"]:
        """The connector: without the class token, each 2 x 2 patches become one visual token."""
        side = self.config.patches_per_side
        order = "j i" if self.config.transposed else "i j"
        sides = {"i": side // MERGE, "j": side // MERGE, "a": MERGE, "b": MERGE}
        x = self.connector_norm(rearrange(x[:, 1:], f"I (i a j b) E -> I ({order}) (a b E)", **sides))
        return self.connector_fc2(jax.nn.gelu(self.connector_fc1(x), approximate=False))

    def __call__(self, patches: Float[Array | np.ndarray, "I Y J C"]) -> Float[Array, "I j D"]:
        """Visual tokens of each image, tile by tile; those of padding tiles are meaningless numbers.

        One image at a time: the attention scores of all tiles of a batch would not fit in memory.
        """

        def image(tiles: Array) -> Array:
            return self.merge(self.features(tiles)).reshape(-1, self.config.out_width)

        return jax.lax.map(image, jnp.asarray(patches))


class InternVL(nnx.Module):
    """The whole model: `vision` makes visual tokens, `decoder` reads them with the text."""

    def __init__(self, config: InternVLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, rngs=rngs)


def closest_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of tiles whose aspect ratio is closest to an image's, as OpenGVLab's code chooses them.

    Among grids of equal distance a later one wins if the image has more than half as many pixels as its tiles.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        tile: side of a tile, in pixels.
        min_tiles: smallest number of tiles, the thumbnail not counted.
        max_tiles: largest number of tiles, the thumbnail not counted.
    """
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    # Grids of equal area stay in the set's order, in the published code and therefore here.
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * tile * tile * columns * rows
        if distance < smallest or (distance == smallest and large):
            best, smallest = (columns, rows), distance
    return best


def cut_tiles(image: Image, tile: int, native: Native) -> np.ndarray:
    """Normalised tiles of an RGB image, float32 [tiles, 3, tile, tile], row by row, the thumbnail last.

    Source: `dynamic_preprocess` and `build_transform` of OpenGVLab/InternVL.
    """
    columns, rows = closest_grid(*image.size, tile, native.min_tiles, native.max_tiles)
    whole = image.resize((columns * tile, rows * tile), Resampling.BICUBIC)
    pixels = rearrange(np.asarray(whole), "(r y) (c x) z -> (r c) z y x", r=rows, c=columns)
    if native.thumbnail and len(pixels) > 1:
        thumbnail = np.asarray(image.resize((tile, tile), Resampling.BICUBIC)).transpose(2, 0, 1)
        pixels = np.concatenate([pixels, thumbnail[None]])
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]


class InternVLChat(ChatTokenizer):
    """Tokenizer and prompts: the checkpoint's chat template, or in the native layout that of OpenGVLab's code.

    The native template is the one `InternVLChatModel.chat` uses (conversation.py), not the one in tokenizer_config.json,
    which belongs to the text model.
    """

    def __init__(self, folder: Path, config: InternVLConfig):
        # Not the parent's, which could ask whether remote code may be run.
        self.tokenizer = load_tokenizer(folder)
        self.images_end_lines = config.native is not None
        vocabulary = self.tokenizer.get_vocab()
        for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END, TURN_END):
            if token not in vocabulary:
                raise UserError(f"{folder}: the tokenizer has no token {token}, so it is not that of an InternVL")
        self.image_token = vocabulary[IMAGE_TOKEN]
        if config.image_token not in (None, self.image_token):
            raise UserError(
                f"{folder}: config.json says image_token_id {config.image_token}, but the tokenizer's {IMAGE_TOKEN} "
                f"is {self.image_token}"
            )
        # The text model's own end token ends a document, not a turn.
        self.tokenizer.eos_token = TURN_END
        if config.native is not None:
            start = "<s>" if config.text_model == "internlm2" else ""
            self.tokenizer.chat_template = _native_template(config.native.template, start)
        elif self.tokenizer.chat_template is None:
            raise UserError(f"{folder}: no chat template; copy chat_template.jinja beside config.json")

    def encode(self, sample: Sample, tokens_per_image: Sequence[int], answer: str | None) -> tuple[np.ndarray, int]:
        """As in the parent; images are enclosed in `<img>` and `</img>`.

        Raises:
            UserError: besides the parent's, the text asks for a video.
        """
        if VIDEO_MARK in sample.question:
            raise UserError(f"{sample.id}: {VIDEO_MARK} in the question; only images are supported")
        if self.images_end_lines and IMAGE_MARK not in sample.question:
            question = f"{IMAGE_MARK}\n" * len(sample.images) + sample.question
            sample = replace(sample, question=question)
        return super().encode(sample, tokens_per_image, answer)

    def ids(self, text: str) -> list[int]:
        """As in the parent; a text that does not begin with it gets the tokenizer's start token."""
        # Older templates of transformers write <image>.
        text = text.replace(IMAGE_MARK, IMAGE_TOKEN)
        text = text.replace(IMAGE_TOKEN, IMAGE_START + IMAGE_TOKEN + IMAGE_END)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return list(self.tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _native_template(name: str, start: str) -> str:
    """A `Conversation` of OpenGVLab's conversation.py as a Jinja template; image tokens are written without brackets."""
    system, end = TEMPLATES[name]
    part = f"{{{{ '{IMAGE_TOKEN}' if part['type'] == 'image' else part['text'] }}}}"
    return (
        f"{start}<|im_start|>system\n{system}{end}"
        "{% for message in messages %}"
        f"<|im_start|>{{{{ message['role'] }}}}\n{{% for part in message['content'] %}}{part}{{% endfor %}}{end}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def image_arrays(config: InternVLConfig, patches: int) -> list[tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of an image as `Preparer` pads it to a bucket of so many patches."""
    vision = config.vision
    tiles = patches // vision.num_patches
    if not tiles:
        raise UserError(f"compute.patch_slots: {patches} patches hold no tile of {vision.num_patches} patches")
    return [((tiles, vision.num_patches, vision.sizes["C"]), jnp.float32)]


class Preparer:
    """Images and prompts of an InternVL checkpoint.

    Args:
        folder: the model's.
        config: of the model.
        patch_slots: bucket sizes in patches; a bucket holds as many whole tiles as fit, so with 1024 patches a tile
            12 tiles and a thumbnail need 13312.
    """

    def __init__(self, folder: Path, config: InternVLConfig, patch_slots: Sequence[int]):
        self.config = config
        self.tile_slots = sorted({slots // config.vision.num_patches for slots in patch_slots} - {0})
        if not self.tile_slots:
            raise UserError(
                f"compute.patch_slots: none of {list(patch_slots)} holds a tile of {config.vision.num_patches} patches"
            )
        self.chat = InternVLChat(folder, config)
        tile, native = config.vision.image_size, config.native
        self._cut: Callable[[Image], np.ndarray] = (
            _hf_cutter(folder, tile) if native is None else lambda image: cut_tiles(image, tile, native)
        )

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[tuple[PreparedImage, int]]:
        """All images of a sample, as `image` prepares each."""
        return [self.image(image, sample_id) for image in pixels]

    def image(self, pixels: Image, sample_id: str) -> tuple[PreparedImage, int]:
        """One image as padded patches float32 [Y, J, C], and its number of tiles."""
        patch = self.config.vision.patch_size
        patches = rearrange(self._cut(pixels), "Y c (r y) (q x) -> Y (r q) (c y x)", y=patch, x=patch)
        slots = next((n for n in self.tile_slots if n >= len(patches)), None)
        if slots is None:
            needed = len(patches) * self.config.vision.num_patches
            raise UserError(
                f"{sample_id}: an image has {len(patches)} tiles, the largest bucket {self.tile_slots[-1]}; add "
                f"{needed} or more to compute.patch_slots or lower the model's largest number of tiles"
            )
        padded = np.pad(patches, ((0, slots - len(patches)), (0, 0), (0, 0)))
        return PreparedImage((padded,), len(patches) * self.config.vision.tile_tokens), len(patches)

    def prompt(self, sample: Sample, tiles: Sequence[int], answer: str | None) -> Prompt:
        """The prompt of a sample whose images have these numbers of tiles, with a reference answer if one is given."""
        tokens_per_image = [count * self.config.vision.tile_tokens for count in tiles]
        ids, answer_length = self.chat.encode(sample, tokens_per_image, answer)
        limit = self.config.max_tokens
        if limit is not None and len(ids) > limit:
            raise UserError(f"{sample.id}: {len(ids)} tokens; with dynamic RoPE scaling at most {limit} are supported")
        positions = np.arange(len(ids), dtype=np.int32)[None]
        return Prompt(ids, ids == self.chat.image_token, positions, len(ids), answer_length)


def _hf_cutter(folder: Path, tile: int) -> Callable[[Image], np.ndarray]:
    """Tiles by the checkpoint's preprocessor_config.json and the image processor of transformers without torch."""
    # Imported here because it pulls in torchvision where that is installed; a model alone needs none of it.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    try:
        processor = GotOcr2ImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: no usable preprocessor_config.json ({reason})") from None
    if (processor.size["height"], processor.size["width"]) != (tile, tile):
        raise UserError(
            f"{folder / 'preprocessor_config.json'}: size {dict(processor.size)} is not supported, the position "
            f"embedding is for {tile} x {tile}"
        )

    def cut(image: Image) -> np.ndarray:
        # InternVLProcessor turns the cropping on, whatever the file says.
        features = processor(images=[image], crop_to_patches=True, return_tensors="np")
        return np.asarray(features["pixel_values"], np.float32)

    return cut
