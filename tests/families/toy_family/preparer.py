"""Images of the toy family are as many patches as they have pixels; its text is bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rlens_jax.data.benchmarks.catalogue import Instance, Turn
from rlens_jax.data.samples import Sample
from rlens_jax.models.chat import Chat
from rlens_jax.models.prompt import ImageArrays, ImageSize, ImageTokens, Measure, PreparedImage, Prompt
from tests.families.toy_family.model import COLOURS, IMAGE_TOKEN, STOP, ToyConfig


def image_sizes(config: ToyConfig, patches: int) -> list[ImageSize]:
    return [(patches,)]


def image_arrays(config: ToyConfig, size: ImageSize) -> ImageArrays:
    return [((*size, COLOURS), jnp.float32)]


def measure(config: ToyConfig, fields: Mapping[str, Any]) -> Measure:
    return lambda width, height: ((width * height,), ImageTokens(width * height))


class ToyChat(Chat):
    stop_tokens = (STOP,)

    def __init__(self) -> None: ...

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < IMAGE_TOKEN).decode()


class ToyPreparer:
    transparency = "white"

    def __init__(self, folder: Path, config: ToyConfig):
        self.chat = ToyChat()

    def images(self, pixels: Sequence[Image], sample_id: str) -> list[PreparedImage]:
        return [self._image(image, sample_id) for image in pixels]

    def _image(self, pixels: Image, sample_id: str) -> PreparedImage:
        patches = np.asarray(pixels, np.float32).reshape(-1, COLOURS) / 255
        return PreparedImage((patches,), ImageTokens(len(patches)))

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        answered = [] if answer is None else [*answer.encode(), STOP]
        visual = sum(image.count for image in images)
        ids = np.array([*[IMAGE_TOKEN] * visual, *sample.question.encode(), *answered], np.int32)
        return Prompt(ids, ids == IMAGE_TOKEN, np.arange(len(ids), dtype=np.int32)[None], len(ids), len(answered))


def benchmark_prompt(instance: Instance, config: ToyConfig, step_by_step: bool) -> Turn:
    return Turn(f"toy: {instance.question}")
