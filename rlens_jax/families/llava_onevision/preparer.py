"""Images and prompts of a LLaVA-OneVision checkpoint: its own image processor, chat template and tokenizer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rlens_jax.data.benchmarks.catalogue import Instance, Turn, default_prompt
from rlens_jax.data.images import MAX_IMAGE_PIXELS, Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.anyres import NEWLINE, base_rows, best_tiles, cut_patches, tile_processor, tile_rows
from rlens_jax.families.chat_files import read_chat
from rlens_jax.families.llava_onevision.model import LlavaOnevisionConfig
from rlens_jax.models.prompt import Grid, ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt

MAX_EXCESS = 1.1
"""A grid is scaled down when its side exceeds the allowed side by more than this factor (from transformers)."""


def _interpolation(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new index: the two old indices around it, int, and its distance from the first, float32.

    Equal to torch's `interpolate(mode="bilinear", align_corners=False)`, with its float32 arithmetic.
    """
    scale = np.float32(size) / np.float32(new_size)
    exact = scale * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    exact = np.maximum(exact, np.float32(0))
    low = np.minimum(exact.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), np.clip(exact - low.astype(np.float32), 0, 1)


def base_sources(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens of the base view: rows of the table and their weights, [Z, corners] each; see `VisionTower`."""
    sources = np.zeros((side**2, 4), np.int32)
    sources[:, 0] = base_rows(side)
    return sources, np.tile(np.array([1, 0, 0, 0], np.float32), (side**2, 1))


def grid_sources(image_size: Grid, tiles: Grid, side: int, max_tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens of the grid of tiles, with a newline after each row: rows of the table and weights, [Z, corners] each.

    `image_size` is (height, width) in pixels before any scaling, `tiles` (rows, columns), `side` in patches per tile. The grid
    keeps about as many visual tokens as `max_tiles` tiles have.
    """
    grid = tile_rows(image_size, tiles, side)
    rows, columns = grid.shape
    excess = math.sqrt(rows * columns / (max_tiles * side**2))
    new_rows, new_columns = rows, columns
    if excess > MAX_EXCESS:
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


def image_sources(config: LlavaOnevisionConfig, image_size: Grid, alone: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Visual tokens of an image as rows of the table and weights, [Z, corners] each, and its number of views.

    `image_size` is (height, width) in pixels before any scaling. An image alone in its prompt also has a grid of tiles.
    """
    sources, weights = base_sources(config.side)
    if alone:
        tiles = best_tiles(image_size, config.pinpoints, config.image_size)
        more = grid_sources(image_size, tiles, config.side, config.max_tiles)
        views = 1 + math.prod(tiles)
    else:
        more = np.full((1, 4), NEWLINE, np.int32), np.array([[1, 0, 0, 0]], np.float32)
        views = 1
    return np.concatenate([sources, more[0]]), np.concatenate([weights, more[1]]), views


def max_tokens(config: LlavaOnevisionConfig, views: int) -> int:
    """Upper bound of the visual tokens of an image of `views` views: the limit of the grid, and a newline per row of patches."""
    side, max_height = config.side, max(height for height, _ in config.pinpoints)
    rows = min((views - 1) * side, max_height // config.image_size * side)
    limit = math.floor(MAX_EXCESS**2 * config.max_tiles * side**2) + 1
    return side**2 + min((views - 1) * side**2, limit) + max(1, rows)


def image_sizes(config: LlavaOnevisionConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`: whole views, of 729 patches in the published models."""
    views = patches // config.side**2
    return [(views, config.side**2)] if views else []


def image_arrays(config: LlavaOnevisionConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    tokens = max_tokens(config, size[0])
    return [((*size, config.vision.sizes["c"]), jnp.float32), ((tokens, 4), jnp.int32), ((tokens, 4), jnp.float32)]


def measure(config: LlavaOnevisionConfig, fields: Mapping[str, Any]) -> Measure:
    """See `Family.measure`; config.json has all that matters."""

    def measured(width: int, height: int) -> tuple[ImageSize, ImageTokens]:
        sources, _, views = image_sources(config, (height, width), alone=True)
        return (views, config.side**2), ImageTokens(len(sources))

    return measured


class LlavaOnevisionPreparer:
    """See `Preparer`."""

    def __init__(self, folder: Path, config: LlavaOnevisionConfig):
        # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

        self.config = config
        self.transparency: Transparency = "white"
        self.chat = read_chat(folder, config.image_token, config.decoder.vocabulary)
        self.image_processor = tile_processor(folder, LlavaOnevisionImageProcessorPil, config.pinpoints, config.image_size)

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as views [v, J, c], sources [Z, corners] and weights [Z, corners]; see `VisionTower`."""
        if not pixels:
            return []
        sizes, prepared = ", ".join(f"{image.width} x {image.height}" for image in pixels), []
        if len(pixels) > 1 and max(max(image.size) for image in pixels) ** 2 > MAX_IMAGE_PIXELS:
            raise UserError(
                f"{sample_id}: of several images each is padded to a square, which is larger than {MAX_IMAGE_PIXELS} pixels for "
                f"one of {sizes}; crop it"
            )
        with foreign(f"{sample_id}: an image of {sizes} pixels cannot be prepared"):
            features = self.image_processor(images=[list(pixels)], return_tensors="np")
        for views, size in zip(features["pixel_values"], features["image_sizes"], strict=True):
            image_size = int(size[0]), int(size[1])
            sources, weights, _ = image_sources(self.config, image_size, alone=len(pixels) == 1)
            patches = cut_patches(views, self.config.vision.patch_size).astype(np.float32)
            prepared.append(PreparedImage((patches, sources, weights), ImageTokens(len(sources))))
        return prepared

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, answer_length = self.chat.encode(sample, [image.count for image in images], answer)
        return Prompt.plain(ids, ids == self.config.image_token, answer_length)


def benchmark_prompt(instance: Instance, config: LlavaOnevisionConfig, step_by_step: bool) -> Turn:
    """VLMEvalKit's default prompts: its vlm/llava/llava.py has none of its own."""
    return default_prompt(instance)
