"""LLaVA-OneVision (arXiv 2408.03326): SigLIP on a base view and the tiles of a grid, an MLP connector, a Qwen2 decoder.

A single image is seen as a whole (the base view) and, scaled to the best of given resolutions, as square tiles. The tiles'
visual tokens form one grid; rows and columns that only show padding are cut off, a large grid is scaled down bilinearly, and
`image_newline` is appended to every row of it (Hugging Face's `pack_image_features`). Of several images in one prompt,
each is its base view, padded to a square, and one newline.

Cutting, scaling and newlines are all a weighted sum of at most four rows of one table, so they come as data: images differ
in shape only by the bucket of views they are padded to. Newlines are visual tokens (our decision, see the method).

Axis letters: I images, W views of an image (padded), J patches of a view, C numbers of a patch, E tower width, D decoder
width, Z visual tokens of an image (padded), Q = 4 corners.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from PIL.Image import Image

from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import ConfigReader, read_json, read_qwen2_decoder
from rlens_jax.families.siglip import SiglipConfig, SiglipTower, read_siglip
from rlens_jax.models.chat import ChatTokenizer
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.layers import Linear
from rlens_jax.models.prompt import PreparedImage, Prompt

MOST_EXCESS = 1.1
"""A grid is scaled down when its side exceeds the allowed one by more than this factor (transformers' constant)."""
NEWLINE = 0
"""Row of the newline in the table that visual tokens are taken from; patch p of view w is row 1 + w J + p."""

QWEN2_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""transformers' own: a nested config.json that it writes leaves out every field that equals its default."""

Size = tuple[int, int]
"""Height and width, or rows and columns."""


@dataclass(frozen=True)
class LlavaOnevisionConfig:
    """Everything that shapes a LLaVA-OneVision model."""

    decoder: DecoderConfig
    vision: SiglipConfig
    image_size: int
    """Side of a view in pixels; what does not fill a patch is not seen."""
    pinpoints: tuple[Size, ...]
    """Resolutions that an image may be scaled to, in pixels."""
    most_tiles: int
    """The grid keeps about as many visual tokens as this many tiles have."""
    image_token: int
    video_token: int

    @property
    def side(self) -> int:
        """Patches a side of a view."""
        return self.image_size // self.vision.patch_size

    @property
    def sizes(self) -> dict[str, int]:
        return {"E": self.vision.width, "D": self.decoder.width, "M": self.decoder.width}


def read_config(config: ConfigReader) -> LlavaOnevisionConfig:
    """Sizes from config.json.

    Raises:
        UserError: a field is missing, or asks for a computation that is not supported.
    """
    text, vision = config.section("text_config"), config.section("vision_config")
    text.require("model_type", "qwen2")
    vision.require("model_type", "siglip_vision_model")
    config.require("projector_hidden_act", "gelu")
    config.require("multimodal_projector_bias", True)
    config.require("vision_feature_layer", -1)
    config.require("vision_feature_select_strategy", "full")
    config.require("use_image_newline_parameter", True)
    aspect_ratio = config.fields.get("vision_aspect_ratio", "anyres_max_9")
    most_tiles = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if most_tiles is None:
        raise UserError(
            f"{config.where}: vision_aspect_ratio = {aspect_ratio!r} is not supported (only 'anyres_max_N')"
        )
    image_size = vision.size("image_size")
    nested = {"text_config": {**QWEN2_DEFAULTS, **text.fields}}
    # transformers ties when either place says so, unlike for other families.
    tied = any(place.fields.get("tie_word_embeddings", False) for place in (config, text))
    return LlavaOnevisionConfig(
        replace(read_qwen2_decoder(ConfigReader(nested, f"{config.where}: text_config")), tied_head=tied),
        read_siglip(vision),
        image_size,
        _read_pinpoints(config, image_size),
        int(most_tiles[1]),
        image_token=config.size("image_token_index", "image_token_id"),
        video_token=config.size("video_token_index", "video_token_id"),
    )


def _read_pinpoints(config: ConfigReader, image_size: int) -> tuple[Size, ...]:
    pinpoints = config.fields.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list) or not pinpoints:
        raise UserError(f"{config.where}: image_grid_pinpoints must be a list of [height, width]")
    for size in pinpoints:
        sides = size if isinstance(size, list) and len(size) == 2 else [0]
        if not all(isinstance(side, int) and side > 0 and side % image_size == 0 for side in sides):
            raise UserError(
                f"{config.where}: image_grid_pinpoints contains {size!r}; only [height, width] in multiples of "
                f"the vision tower's image_size, {image_size}, are supported"
            )
    return tuple((height, width) for height, width in pinpoints)


class LlavaVision(nnx.Module):
    """Tower, connector and newline: from the views of each image to its visual tokens."""

    def __init__(self, config: LlavaOnevisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = config.sizes
        self.tower = SiglipTower(config.vision, dtype=dtype, rngs=rngs)
        self.projector_fc1 = Linear("IJE,EM->IJM", sizes, bias="M", dtype=dtype, rngs=rngs)
        self.projector_fc2 = Linear("IJM,MD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)
        self.image_newline = nnx.Param(
            jax.random.normal(rngs.params(), (sizes["D"],), dtype) * jnp.asarray(sizes["D"] ** -0.5, dtype)
        )

    def features(self, views: Float[Array | np.ndarray, "W J C"]) -> Float[Array, "W J E"]:
        """The tower's output; every view has all its patches."""
        count, patches, _ = views.shape
        positions = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (count, patches))
        return self.tower(views, positions, jnp.full(count, patches, jnp.int32))

    def project(self, x: Float[Array, "W J E"]) -> Float[Array, "W J D"]:
        """The connector, a two-layer MLP."""
        return self.projector_fc2(jax.nn.gelu(self.projector_fc1(x), approximate=False))

    def __call__(
        self,
        views: Float[Array | np.ndarray, "I W J C"],
        sources: Int[Array | np.ndarray, "I Z Q"],
        weights: Float[Array | np.ndarray, "I Z Q"],
    ) -> Float[Array, "I Z D"]:
        """Visual tokens of each image, the newlines among them; padding ones are 0.

        Args:
            views: pixel values of each patch, base view first; padding views may hold anything finite.
            sources: for each visual token, the rows of the table (see `NEWLINE`) that it is made of.
            weights: and how much of each; float32.
        """
        images, count, patches, numbers = views.shape
        x = self.project(self.features(views.reshape(images * count, patches, numbers)))
        newline = jnp.broadcast_to(self.image_newline[...], (images, 1, x.shape[-1]))
        table = jnp.concatenate([newline, x.reshape(images, count * patches, -1)], axis=1)
        pick = jax.vmap(lambda rows, places: rows[places])
        # In float32, as torch interpolates; a whole row comes back bit for bit.
        tokens = sum(
            pick(table, sources[:, :, q]).astype(jnp.float32) * weights[:, :, q, None] for q in range(sources.shape[2])
        )
        return jnp.asarray(tokens, table.dtype)


class LlavaOnevision(nnx.Module):
    """The whole model: `vision` makes visual tokens, `decoder` reads them with the text."""

    def __init__(self, config: LlavaOnevisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision = LlavaVision(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, rngs=rngs)


def cut_patches(views: np.ndarray, patch_size: int) -> np.ndarray:
    """Views [W, 3, S, S] as patches [W, J, C], each in (channel, row, column) order; incomplete ones are left out."""
    count, channels, *shape = views.shape
    rows, columns = (side // patch_size for side in shape)
    whole = views[:, :, : rows * patch_size, : columns * patch_size]
    whole = whole.reshape(count, channels, rows, patch_size, columns, patch_size)
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, -1)


def _interpolation(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per new index the two old ones that it lies between, int, and how far it is from the first, float32.

    As torch's `interpolate(mode="bilinear", align_corners=False)`, with its float32 arithmetic.
    """
    scale = np.float32(size) / np.float32(new_size)
    exact = scale * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    exact = np.maximum(exact, np.float32(0))
    low = np.minimum(exact.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), np.clip(exact - low.astype(np.float32), 0, 1)


def _unpadded(grid: np.ndarray, image_size: Size) -> np.ndarray:
    """The middle of a grid [rows, columns] that an image of this size (in pixels) fills, without its padding."""
    height, width = image_size
    rows, columns = grid.shape
    # The same floating-point expressions as transformers': they decide by rounding.
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, padding : columns - padding]


def base_sources(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The base view's visual tokens: rows of the table [Z, Q] and weights [Z, Q], see `LlavaVision`."""
    sources = np.zeros((side**2, 4), np.int32)
    sources[:, 0] = 1 + np.arange(side**2)
    return sources, np.tile(np.array([1, 0, 0, 0], np.float32), (side**2, 1))


def grid_sources(image_size: Size, tiles: Size, side: int, most_tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """The visual tokens of the grid of tiles, row by row with a newline after each: table rows and weights, [Z, Q].

    Args:
        image_size: height and width of the image in pixels, before any scaling.
        tiles: rows and columns of tiles.
        side: patches a side of a tile.
        most_tiles: the grid keeps about as many visual tokens as this many tiles have.
    """
    row, column = np.ogrid[: tiles[0] * side, : tiles[1] * side]
    view = 1 + (row // side) * tiles[1] + column // side
    grid = _unpadded(1 + view * side**2 + (row % side) * side + column % side, image_size)
    rows, columns = grid.shape
    excess = math.sqrt(rows * columns / (most_tiles * side**2))
    new_rows, new_columns = rows, columns
    if excess > MOST_EXCESS:
        new_rows, new_columns = int(rows // excess), int(columns // excess)
    top, bottom, down = _interpolation(rows, new_rows)
    left, right, across = _interpolation(columns, new_columns)
    sources = np.full((new_rows, new_columns + 1, 4), NEWLINE, np.int32)
    weights = np.zeros(sources.shape, np.float32)
    weights[:, -1, 0] = 1
    corners = (
        (top, 1 - down, left, 1 - across),
        (top, 1 - down, right, across),
        (bottom, down, left, 1 - across),
        (bottom, down, right, across),
    )
    for q, (vertical, vertical_share, horizontal, horizontal_share) in enumerate(corners):
        sources[:, :-1, q] = grid[np.ix_(vertical, horizontal)]
        weights[:, :-1, q] = np.outer(vertical_share, horizontal_share)
    return sources.reshape(-1, 4), weights.reshape(-1, 4)


def image_sources(config: LlavaOnevisionConfig, image_size: Size, alone: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """An image's visual tokens, as table rows and weights [Z, Q], and its number of views.

    Args:
        config: of the model.
        image_size: height and width of the image in pixels, before any scaling.
        alone: it is the only image of its prompt, so it also has a grid of tiles.
    """
    # Imported here because it pulls in torchvision where that is installed; a model alone needs none of it.
    from transformers.image_processing_utils import select_best_resolution

    sources, weights = base_sources(config.side)
    if alone:
        height, width = select_best_resolution(image_size, config.pinpoints)
        rows, columns = height // config.image_size, width // config.image_size
        more = grid_sources(image_size, (rows, columns), config.side, config.most_tiles)
        views = 1 + rows * columns
    else:
        more = np.full((1, 4), NEWLINE, np.int32), np.array([[1, 0, 0, 0]], np.float32)
        views = 1
    return np.concatenate([sources, more[0]]), np.concatenate([weights, more[1]]), views


def most_tokens(config: LlavaOnevisionConfig, views: int) -> int:
    """No image of so many views has more visual tokens: a newline for each row of patches, and the limit of the grid."""
    side, most_rows = config.side, max(height for height, _ in config.pinpoints)
    rows = min((views - 1) * side, most_rows // config.image_size * side)
    limit = math.floor(MOST_EXCESS**2 * config.most_tiles * side**2) + 1
    return side**2 + min((views - 1) * side**2, limit) + max(1, rows)


def image_arrays(config: LlavaOnevisionConfig, patches: int) -> list[tuple[tuple[int, ...], DTypeLike]]:
    """Shapes and dtypes of an image as `Preparer` pads it to a bucket of so many patches."""
    per_view = config.side**2
    views = patches // per_view
    if not views:
        raise UserError(f"compute.patch_slots: {patches} patches hold no view of {per_view} patches")
    tokens = most_tokens(config, views)
    values = (views, per_view, config.vision.sizes["C"])
    return [(values, jnp.float32), ((tokens, 4), jnp.int32), ((tokens, 4), jnp.float32)]


class Preparer:
    """Images and prompts of a checkpoint, by its own image processor (the one without torch), template and tokenizer.

    An image's bucket is its number of views: `patch_slots` counts patches, as for other families, and a bucket of n patches
    holds n // J views, with J = 729 in the published models.
    """

    def __init__(self, folder: Path, config: LlavaOnevisionConfig, patch_slots: Sequence[int]):
        # Imported here because it pulls in torchvision where that is installed; a model alone needs none of it.
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        self.config = config
        self.patch_slots = sorted(patch_slots)
        self.chat = ChatTokenizer(folder, config.image_token)
        # The processor's template goes before the tokenizer's, which may be of the language model alone.
        if (folder / "chat_template.json").exists():
            self.chat.tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
        try:
            self.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}: no usable preprocessor_config.json ({reason})") from None
        pinpoints = tuple((height, width) for height, width in self.image_processor.image_grid_pinpoints)
        size = self.image_processor.size
        if pinpoints != config.pinpoints or {size.height, size.width} != {config.image_size}:
            raise UserError(
                f"{folder}: preprocessor_config.json and config.json differ in image_grid_pinpoints or in the "
                "size of a view; take both from the same checkpoint"
            )

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[tuple[PreparedImage, int]]:
        """All images of a sample: each as padded views [W, J, C], sources and weights [Z, Q]; and its visual tokens."""
        if not pixels:
            return []
        features = self.image_processor(images=[list(pixels)], return_tensors="np")
        prepared = []
        for views, size in zip(features["pixel_values"], features["image_sizes"], strict=True):
            image_size = int(size[0]), int(size[1])
            sources, weights, _ = image_sources(self.config, image_size, alone=len(pixels) == 1)
            image = self._padded(cut_patches(views, self.config.vision.patch_size), sources, weights, sample_id)
            prepared.append((image, image.num_tokens))
        return prepared

    def _padded(self, patches: np.ndarray, sources: np.ndarray, weights: np.ndarray, sample_id: str) -> PreparedImage:
        count, per_view, _ = patches.shape
        slots = next((n // per_view for n in self.patch_slots if n // per_view >= count), None)
        if slots is None:
            raise UserError(
                f"{sample_id}: an image has {count * per_view} patches ({count} views), the largest bucket "
                f"{self.patch_slots[-1]}; add a larger one to compute.patch_slots or make the image smaller"
            )
        room = most_tokens(self.config, slots) - len(sources)
        arrays = (
            np.pad(patches.astype(np.float32), ((0, slots - count), (0, 0), (0, 0))),
            np.pad(sources, ((0, room), (0, 0))),
            np.pad(weights, ((0, room), (0, 0))),
        )
        return PreparedImage(arrays, len(sources))

    def prompt(self, sample: Sample, tokens_per_image: Sequence[int], answer: str | None) -> Prompt:
        """The prompt of a sample whose images have so many visual tokens, with a reference answer if one is given."""
        ids, answer_length = self.chat.encode(sample, tokens_per_image, answer)
        if (ids == self.config.video_token).any():
            raise UserError(f"{sample.id}: the text contains the model's video placeholder; videos are not supported")
        positions = np.arange(len(ids), dtype=np.int32)
        return Prompt(ids, ids == self.config.image_token, positions[None], len(ids), answer_length)
