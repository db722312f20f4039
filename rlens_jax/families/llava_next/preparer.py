"""Images and prompts of a LLaVA-NeXT checkpoint: its own image processor, chat template and tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.errors import foreign
from rlens_jax.families.anyres import cut_patches, tile_processor
from rlens_jax.families.chat_files import read_chat
from rlens_jax.families.llava_next.model import LlavaNextConfig, image_rows
from rlens_jax.models.prompt import ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt


def max_tokens(config: LlavaNextConfig, views: int) -> int:
    """The most visual tokens of an image of up to `views` views: those of a grid without padding, and a newline per row."""
    side, view = config.vision.side, config.vision.image_size
    grids = [(height // view, width // view) for height, width in config.pinpoints]
    return side**2 + max((rows * side * (columns * side + 1) for rows, columns in grids if rows * columns < views), default=0)


def image_sizes(config: LlavaNextConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`: whole views, of 576 patches in the published models."""
    views = patches // config.vision.num_patches
    return [(views, config.vision.num_patches)] if views else []


def image_arrays(config: LlavaNextConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    return [((*size, config.vision.sizes["c"]), jnp.float32), ((max_tokens(config, size[0]),), jnp.int32)]


def measure(config: LlavaNextConfig, fields: Mapping[str, Any]) -> Measure:
    """See `Family.measure`; config.json has all that matters."""

    def measured(width: int, height: int) -> tuple[ImageSize, ImageTokens]:
        rows, views = image_rows(config, (height, width))
        return (views, config.vision.num_patches), ImageTokens(len(rows))

    return measured


class LlavaNextPreparer:
    """See `Preparer`."""

    def __init__(self, folder: Path, config: LlavaNextConfig):
        # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        self.config = config
        self.transparency: Transparency = "white"
        self.chat = read_chat(folder, config.image_token, config.decoder.vocabulary)
        self.image_processor = tile_processor(folder, LlavaNextImageProcessorPil, config.pinpoints, config.vision.image_size)

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as views [v, J, c] and rows of the table [Z]; see `VisionTower`."""
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> PreparedImage:
        with foreign(f"{sample_id}: an image of {pixels.width} x {pixels.height} pixels cannot be prepared"):
            (views,) = self.image_processor(images=[pixels], return_tensors="np")["pixel_values"]
        rows, _ = image_rows(self.config, (pixels.height, pixels.width))
        patches = cut_patches(np.asarray(views, np.float32), self.config.vision.patch_size)
        return PreparedImage((patches, rows), ImageTokens(len(rows)))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, answer_length = self.chat.encode(sample, [image.count for image in images], answer)
        return Prompt.plain(ids, ids == self.config.image_token, answer_length)
