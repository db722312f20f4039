"""Images and prompts of a LLaVA-1.5 checkpoint: its own image processor, chat template and tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rlens_jax.data.benchmarks.catalogue import Instance, Turn, choice_by_letter, default_prompt, is_choice
from rlens_jax.data.images import MAX_IMAGE_PIXELS, Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.anyres import cut_patches
from rlens_jax.families.chat_files import read_chat
from rlens_jax.families.image_files import make_processor, read_processor_fields
from rlens_jax.families.llava.model import LlavaConfig
from rlens_jax.models.prompt import ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt


def image_sizes(config: LlavaConfig, patches: int) -> list[ImageSize]:
    """See `Family.image_sizes`: all images have the same size, 576 patches in the published models."""
    return [(config.vision.num_patches,)] if patches >= config.vision.num_patches else []


def image_arrays(config: LlavaConfig, size: ImageSize) -> ImageArrays:
    """See `Family.image_arrays`."""
    return [((*size, config.vision.sizes["c"]), jnp.float32)]


def measure(config: LlavaConfig, fields: Mapping[str, Any]) -> Measure:
    """See `Family.measure`; every image is one view."""
    patches = config.vision.num_patches
    return lambda width, height: ((patches,), ImageTokens(patches))


class LlavaPreparer:
    """See `Preparer`.

    The published files scale an image's shorter side to the view and cut its middle out. Files that name LlavaImageProcessor may
    ask for padding to a square with the mean colour instead (`do_pad`), which the model was trained with.
    """

    def __init__(self, folder: Path, config: LlavaConfig):
        # Imported here: where torchvision is installed this import loads it, and a model without images needs neither.
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        self.config = config
        self.transparency: Transparency = "white"
        self.chat = read_chat(folder, config.image_token, config.decoder.vocabulary)
        fields, where = read_processor_fields(folder)
        padding = str(fields.get("image_processor_type")).startswith("LlavaImageProcessor")
        self.image_processor = make_processor(LlavaImageProcessorPil if padding else CLIPImageProcessorPil, fields, where)
        crop, side = self.image_processor.crop_size, config.vision.image_size
        if not self.image_processor.do_center_crop or not crop or (crop.height, crop.width) != (side, side):
            raise UserError(
                f"{where}: only do_center_crop with a crop_size of {side} x {side} is supported, as config.json has it"
            )

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        """Each image as patches [J, c]."""
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> PreparedImage:
        (short, long), vision = sorted(pixels.size), self.config.vision
        if max(vision.image_size**2 * long // short, long**2) > MAX_IMAGE_PIXELS:
            raise UserError(
                f"{sample_id}: an image of {pixels.width} x {pixels.height} pixels is too thin to be made a square; crop it"
            )
        with foreign(f"{sample_id}: an image of {pixels.width} x {pixels.height} pixels cannot be prepared"):
            views = self.image_processor(images=[pixels], return_tensors="np")["pixel_values"]
        (patches,) = cut_patches(np.asarray(views, np.float32), vision.patch_size)
        return PreparedImage((patches,), ImageTokens(vision.num_patches))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """See `Preparer.prompt`."""
        ids, answer_length = self.chat.encode(sample, [image.count for image in images], answer)
        return Prompt.plain(ids, ids == self.config.image_token, answer_length)


def benchmark_prompt(instance: Instance, config: LlavaConfig, step_by_step: bool) -> Turn:
    """The prompts of VLMEvalKit's vlm/llava/llava.py, in the turn of the checkpoint's chat template."""
    return Turn(choice_by_letter(instance)) if is_choice(instance) else default_prompt(instance)
