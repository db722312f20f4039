"""The toy family's tower: one linear map from the colour of a patch to a visual token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import read_qwen2_decoder
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import Linear

IMAGE_TOKEN, STOP = 256, 257
COLOURS = 3


@dataclass(frozen=True)
class ToyVisionConfig:
    depth: int


@dataclass(frozen=True)
class ToyConfig:
    decoder: DecoderConfig
    vision: ToyVisionConfig


def read_config(config: ConfigReader) -> ToyConfig:
    return ToyConfig(read_qwen2_decoder(config), ToyVisionConfig(config.section("vision_config").size("depth")))


class ToyVision(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = {"c": COLOURS, "D": config.decoder.width}
        self.project = Linear("IJc,cD->IJD", sizes, bias="D", dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array | np.ndarray, "I J c"]) -> Float[jax.Array, "I J D"]:
        return self.project(jnp.asarray(patches, self.project.kernel.dtype))
