"""Images and prompts of a Qwen2-VL checkpoint: its own image processor and tokenizer, and mRoPE positions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rlens_jax.data.benchmarks.catalogue import (
    CHINESE_LETTER,
    SELECT,
    Instance,
    Turn,
    is_chinese,
    is_choice,
    question_and_options,
)
from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.chat_files import read_chat
from rlens_jax.families.image_files import make_processor, read_processor_fields
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.models.prompt import Grid, ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt

MAX_RATIO = 200
"""Longer images are refused, as by transformers."""
MIN_PIXELS, MAX_PIXELS = 56**2, 1280 * 28**2
"""Pixels of an image after resizing, if the processor's file has none (transformers)."""
PUBLISHED_PIXELS = {"shortest_edge": 56**2, "longest_edge": 16384 * 28**2}
"""These limits in the published checkpoints' file."""


def patch_places(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column of each patch of an image, int32 [J, 2], in merge order; `grid` is (rows, columns) of patches."""
    (rows, columns), m = grid, merge_size
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    places = places.reshape(rows // m, m, columns // m, m, 2).transpose(0, 2, 1, 3, 4)
    return places.reshape(-1, 2).astype(np.int32)


def rope_positions(is_visual: np.ndarray, grids: Sequence[Grid], merge_size: int) -> tuple[np.ndarray, int]:
    """mRoPE positions of a prompt: int32 [3, T] (time, height, width), and the position of the next token.

    Text tokens count up on all three axes. The tokens of an image share one time and count rows and columns of merged patches.
    The text after an image continues after its largest position. `is_visual` is bool [T]; `grids` are rows and columns of the
    patches of each image, in order.
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


def image_sizes(config: Qwen2VLConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`."""
    return [(patches,)]


def image_arrays(config: Qwen2VLConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    (patches,) = size
    return [((patches, config.vision.sizes["c"]), jnp.float32), ((patches, 2), jnp.int32), ((), jnp.int32)]


def measure(config: Qwen2VLConfig, fields: Mapping[str, Any], published: Mapping[str, int] = PUBLISHED_PIXELS) -> Measure:
    """See `Family.measure`; `published` are the limits of pixels in the published checkpoints' file."""
    # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    side, merge = config.vision.patch_size, config.vision.merge_size
    limits = _with_limits(fields, published)["size"]

    def measured(width: int, height: int) -> tuple[ImageSize, ImageTokens]:
        if fields.get("do_resize", True):
            height, width = smart_resize(height, width, side * merge, limits["shortest_edge"], limits["longest_edge"])
        grid = height // side, width // side
        patches = math.prod(grid)
        return (patches,), ImageTokens(patches // merge**2, grid)

    return measured


def _with_limits(fields: Mapping[str, Any], default: Mapping[str, int]) -> dict[str, Any]:
    """The fields of an image processor, with the limits of pixels where transformers reads them."""
    rest, size = dict(fields), dict(fields.get("size") or {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        spellings = (rest.pop(name, None), size.get(edge), size.pop(name, None), default[edge])
        size[edge] = next(value for value in spellings if value is not None)
    return rest | {"size": size}


def _processor_fields(folder: Path, config: Qwen2VLConfig, limits: Mapping[str, int]) -> tuple[dict[str, Any], str]:
    """The fields of the image processor, with the limits of pixels where transformers reads them, and the file that has them.

    Raises:
        UserError: a field is unusable or does not fit config.json.
    """
    fields, where = read_processor_fields(folder)
    if limits and fields.get("do_resize") is False:
        raise UserError(f"{where}: do_resize is false, so {' and '.join(limits)} would change nothing; leave them out")
    fields |= limits
    vision = config.vision
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.merge_size, "temporal_patch_size": vision.temporal_patch}
    for name, value in sizes.items():
        if fields.setdefault(name, value) != value:
            raise UserError(f"{where}: {name} {fields[name]} is not config.json's {value}; take both files from one checkpoint")
    fields = _with_limits(fields, {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    size = fields["size"]
    if set(size) != {"shortest_edge", "longest_edge"} or size["shortest_edge"] > size["longest_edge"]:
        given = "".join(f" with {name} {value}" for name, value in limits.items())
        raise UserError(f"{where}{given}: size must be the smallest and the largest number of pixels of an image, not {size}")
    return fields, where


class Qwen2VLPreparer:
    """See `Preparer`; the image processor is the one of transformers that needs no torch.

    `limits`, min_pixels and max_pixels, take the place of the folder's.
    """

    def __init__(self, folder: Path, config: Qwen2VLConfig, limits: Mapping[str, int] = MappingProxyType({})):
        # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.config = config
        self.transparency: Transparency = "white"
        self.chat = read_chat(folder, config.image_token, config.decoder.vocabulary)
        self.image_processor = make_processor(Qwen2VLImageProcessorPil, *_processor_fields(folder, config, limits))

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as patches [J, c], places [J, 2] and the number of real patches []."""
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> PreparedImage:
        width, height = pixels.size
        if max(width, height) > MAX_RATIO * min(width, height):
            raise UserError(
                f"{sample_id}: an image of {width} x {height} pixels: its longer side is more than {MAX_RATIO} times the shorter "
                "one; crop it"
            )
        with foreign(f"{sample_id}: an image of {width} x {height} pixels cannot be prepared"):
            features = self.image_processor(images=[pixels], return_tensors="np")
        _, rows, columns = (int(side) for side in features["image_grid_thw"][0])
        grid, merge = (rows, columns), self.config.vision.merge_size
        patches = np.asarray(features["pixel_values"], np.float32)
        arrays = patches, patch_places(grid, merge), np.array(len(patches), np.int32)
        return PreparedImage(arrays, ImageTokens(len(patches) // merge**2, grid))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, answer_length = self.chat.encode(sample, [image.count for image in images], answer)
        is_visual = ids == self.config.image_token
        grids = [image.grid for image in images]
        positions, following = rope_positions(is_visual, grids, self.config.vision.merge_size)
        return Prompt(ids, is_visual, positions, following, answer_length)


def benchmark_prompt(instance: Instance, config: Qwen2VLConfig, step_by_step: bool) -> Turn:
    """The prompts of VLMEvalKit's vlm/qwen2_vl/prompt.py."""
    if is_choice(instance):
        text = question_and_options(instance)
        if not instance.options:
            return Turn(text.rstrip("\n"))
        return Turn(text + (CHINESE_LETTER if is_chinese(text) else SELECT))
    # POPE's questions say so already.
    if instance.dataset in ("HallusionBench", "POPE"):
        return Turn(f"{instance.question} Please answer yes or no.")
    if instance.dataset == "MME":
        return Turn(instance.question)
    return Turn(f"{instance.question}\nPlease try to answer the question with short words or phrases if possible.")
