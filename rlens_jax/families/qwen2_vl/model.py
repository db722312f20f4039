"""Qwen2-VL (arXiv 2409.12191): vision tower with 2-D RoPE and dynamic resolution, 2x2 merger, mRoPE positions.

Images never give a shape to a compiled program: each is padded to a bucket of patches, with its real number of patches and
their grid places as data. Patches come in merge order (each 4 consecutive ones become one visual token), as Hugging Face's
image processor hands them out, so padding stays at the end.

Axis letters: I images, J patches (padded), E tower width, N heads, H head dim, D decoder width, B batch, T packed slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree
from PIL.Image import Image

from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import ConfigReader, read_qwen2_decoder
from rlens_jax.models.chat import ChatTokenizer
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear, rotate, rotation
from rlens_jax.models.prompt import PreparedImage, Prompt
from rlens_jax.ops.attention import masked_attention

VISION_ROPE_THETA = 10000.0
VISION_NORM_EPS = 1e-6
QUERY_BLOCK = 1024
"""Patches that query together: a large image's whole score matrix would not fit in memory."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; a patch is channels x temporal_patch x patch_size x patch_size numbers."""

    depth: int
    width: int
    num_heads: int
    ffn_width: int
    channels: int
    temporal_patch: int
    patch_size: int
    merge_size: int
    out_width: int

    @property
    def sizes(self) -> dict[str, int]:
        group = self.merge_size**2 * self.width
        return {
            "C": self.channels * self.temporal_patch * self.patch_size**2,
            "E": self.width,
            "N": self.num_heads,
            "H": self.width // self.num_heads,
            "F": self.ffn_width,
            "G": group,
            "M": group,
            "D": self.out_width,
        }


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Everything that shapes a Qwen2-VL model."""

    decoder: DecoderConfig
    vision: VisionConfig
    image_token: int
    video_token: int


def read_config(config: ConfigReader) -> Qwen2VLConfig:
    """Sizes from config.json.

    Raises:
        UserError: a field is missing, or asks for a computation that is not supported.
    """
    vision = config.section("vision_config")
    vision.require("hidden_act", "quick_gelu")
    width = vision.size("embed_dim")
    decoder = read_qwen2_decoder(config)
    return Qwen2VLConfig(
        decoder,
        VisionConfig(
            depth=vision.size("depth"),
            width=width,
            num_heads=vision.size("num_heads"),
            ffn_width=int(width * vision.number("mlp_ratio")),
            channels=vision.size("in_channels", "in_chans", default=3),
            temporal_patch=vision.size("temporal_patch_size", default=2),
            patch_size=vision.size("patch_size"),
            merge_size=vision.size("spatial_merge_size", default=2),
            out_width=decoder.width,
        ),
        image_token=config.size("image_token_id"),
        video_token=config.size("video_token_id"),
    )


class VisionLayer(nnx.Module):
    """Pre-norm full attention within one image, and a quick-GELU MLP."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = config.sizes
        self.attention_norm = LayerNorm(config.width, eps=VISION_NORM_EPS, dtype=dtype)
        self.q_proj = Linear("IJE,ENH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.k_proj = Linear("IJE,ENH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.v_proj = Linear("IJE,ENH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.o_proj = Linear("INJH,NHE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, eps=VISION_NORM_EPS, dtype=dtype)
        self.fc1 = Linear("IJE,EF->IJF", sizes, bias="F", dtype=dtype, rngs=rngs)
        self.fc2 = Linear("IJF,FE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "I J E"],
        turn: tuple[Float[Array, "I J half"], Float[Array, "I J half"]],
        is_patch: Bool[Array, "I J"],
    ) -> Float[Array, "I J E"]:
        y = self.attention_norm(x)
        q, k, v = rotate(self.q_proj(y), turn), rotate(self.k_proj(y), turn), self.v_proj(y)
        q, k, v = (z.swapaxes(1, 2) for z in (q, k, v))
        x = x + self.o_proj(_attend(q, k, v, is_patch))
        hidden = self.fc1(self.mlp_norm(x))
        return x + self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden))


def _attend(
    q: Float[Array, "I N J H"],
    k: Float[Array, "I N J H"],
    v: Float[Array, "I N J H"],
    is_patch: Bool[Array, "I J"],
) -> Float[Array, "I N J H"]:
    """Every patch attends to all patches of its image; those of a large image query in equal blocks, one after the other.

    The blocks are a loop, so that 64 of them are compiled no longer than one.
    """
    images, heads, patches, head_dim = q.shape
    count = -(-patches // QUERY_BLOCK)
    size = -(-patches // count)

    def attend(block: Float[Array, "I N b H"]) -> Float[Array, "I N b H"]:
        mask = jnp.broadcast_to(is_patch[:, None], (images, block.shape[2], patches))
        return masked_attention(block, k, v, mask)

    if count == 1:
        return attend(q)
    filled = jnp.pad(q, ((0, 0), (0, 0), (0, count * size - patches), (0, 0)))
    blocks = jnp.moveaxis(filled.reshape(images, heads, count, size, head_dim), 2, 0)
    attended = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 2)
    return attended.reshape(images, heads, count * size, head_dim)[:, :, :patches]


class VisionTower(nnx.Module):
    """Patches to visual tokens: patch embedding, stacked layers, and the merger (the connector)."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = config.sizes
        self.config = config
        self.patch_embed = Linear("IJC,CE->IJE", sizes, dtype=dtype, rngs=rngs)
        make = nnx.vmap(lambda rngs: VisionLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.depth))
        self.merger_norm = LayerNorm(config.width, eps=VISION_NORM_EPS, dtype=dtype)
        self.merger_fc1 = Linear("IJG,GM->IJM", sizes, bias="M", dtype=dtype, rngs=rngs)
        self.merger_fc2 = Linear("IJM,MD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J C"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """The tower's output before the merger.

        Args:
            patches: flattened pixel values of each patch, in merge order, padded with anything.
            places: row and column of each patch in its image.
            num_patches: how many patches of each image are real.
        """
        head_dim = self.config.width // self.config.num_heads
        quarter = head_dim // 4
        frequency = 1.0 / VISION_ROPE_THETA ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
        angles = jnp.asarray(places, jnp.float32)[..., None] * frequency[None, None, None]
        turn = rotation(angles.reshape(*places.shape[:2], 2 * quarter))
        is_patch = jnp.arange(patches.shape[1])[None] < num_patches[:, None]
        graph, stack = nnx.split(self.layers)

        def body(x: Array, layer: PyTree) -> tuple[Array, None]:
            return nnx.merge(graph, layer)(x, turn, is_patch), None

        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        return jax.lax.scan(body, x, stack)[0]

    def merge(self, x: Float[Array, "I J E"]) -> Float[Array, "I j D"]:
        """The connector: each merge_size ** 2 consecutive patches become one visual token of the decoder's width."""
        images, patches, width = x.shape
        group = self.config.merge_size**2
        x = self.merger_norm(x).reshape(images, patches // group, group * width)
        return self.merger_fc2(jax.nn.gelu(self.merger_fc1(x), approximate=False))

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I J C"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I j D"]:
        """Visual tokens of each image; those of padding patches are meaningless numbers."""
        return self.merge(self.features(patches, places, num_patches))


class Qwen2VL(nnx.Module):
    """The whole model: `vision` makes visual tokens, `decoder` reads them with the text."""

    def __init__(self, config: Qwen2VLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, rngs=rngs)


def patch_places(grid: tuple[int, int], merge_size: int) -> np.ndarray:
    """Row and column of each patch of an image, int32 [J, 2], in merge order.

    Args:
        grid: rows and columns of patches.
        merge_size: side of the square of patches that becomes one visual token.
    """
    rows, columns = grid
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    m = merge_size
    places = places.reshape(rows // m, m, columns // m, m, 2).transpose(0, 2, 1, 3, 4)
    return places.reshape(-1, 2).astype(np.int32)


def rope_positions(is_visual: np.ndarray, grids: Sequence[tuple[int, int]], merge_size: int) -> tuple[np.ndarray, int]:
    """mRoPE positions of a prompt: int32 [3, T] (time, height, width), and the position of the token after it.

    Text counts up on all three axes; an image's tokens share one time, count rows and columns of merged patches, and the
    text after it goes on past its largest position.

    Args:
        is_visual: bool [T], True for image tokens.
        grids: rows and columns of patches of each image, in order.
        merge_size: side of the square of patches that becomes one visual token.
    """
    positions = np.zeros((3, len(is_visual)), np.int32)
    images = iter(grids)
    token, following = 0, 0
    while token < len(is_visual):
        if not is_visual[token]:
            positions[:, token] = following
            token, following = token + 1, following + 1
            continue
        rows, columns = (side // merge_size for side in next(images))
        span = slice(token, token + rows * columns)
        positions[0, span] = following
        positions[1, span] = following + np.repeat(np.arange(rows), columns)
        positions[2, span] = following + np.tile(np.arange(columns), rows)
        token, following = token + rows * columns, following + max(rows, columns)
    return positions, following


def image_arrays(config: Qwen2VLConfig, patches: int) -> list[tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of an image as `Preparer` pads it to a bucket of so many patches."""
    channels = config.vision.sizes["C"]
    return [((patches, channels), jnp.float32), ((patches, 2), jnp.int32), ((), jnp.int32)]


class Preparer:
    """Images and prompts of a Qwen2-VL checkpoint, by its own image processor (the one without torch) and tokenizer."""

    def __init__(self, folder: Path, config: Qwen2VLConfig, patch_slots: Sequence[int]):
        # Imported here because it pulls in torchvision where that is installed; a model alone needs none of it.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.config = config
        self.patch_slots = sorted(patch_slots)
        self.chat = ChatTokenizer(folder, config.image_token)
        try:
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}: no usable preprocessor_config.json ({reason})") from None

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[tuple[PreparedImage, tuple[int, int]]]:
        """All images of a sample: each as padded patches [J, C], places [J, 2] and their number; and its grid of patches."""
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> tuple[PreparedImage, tuple[int, int]]:
        features = self.image_processor(images=[pixels], return_tensors="np")
        _, rows, columns = (int(side) for side in features["image_grid_thw"][0])
        grid = rows, columns
        patches = np.asarray(features["pixel_values"], np.float32)
        slots = next((n for n in self.patch_slots if n >= len(patches)), None)
        if slots is None:
            raise UserError(
                f"{sample_id}: an image has {len(patches)} patches, the largest bucket {self.patch_slots[-1]}; "
                "add a larger one to compute.patch_slots or lower max_pixels in preprocessor_config.json"
            )
        arrays = (
            np.pad(patches, ((0, slots - len(patches)), (0, 0))),
            np.pad(patch_places(grid, self.config.vision.merge_size), ((0, slots - len(patches)), (0, 0))),
            np.array(len(patches), np.int32),
        )
        return PreparedImage(arrays, len(patches) // self.config.vision.merge_size**2), grid

    def prompt(self, sample: Sample, grids: Sequence[tuple[int, int]], answer: str | None) -> Prompt:
        """The prompt of a sample whose images have these grids, with a reference answer if one is given."""
        merge = self.config.vision.merge_size
        tokens_per_image = [rows * columns // merge**2 for rows, columns in grids]
        ids, answer_length = self.chat.encode(sample, tokens_per_image, answer)
        is_visual = ids == self.config.image_token
        positions, following = rope_positions(is_visual, grids, merge)
        return Prompt(ids, is_visual, positions, following, answer_length)
