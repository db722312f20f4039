"""MiniCPM-V 2.6's vision module: SigLIP on views of any grid, and a resampler with learned queries.

An image is one or several *views*: the whole image, and slices of it if it is large. A view has about 1024 patches and always
the same number of visual tokens. Views and patches are padded to buckets; their real numbers are data. The code that is
published with the checkpoints is never run: slicing and prompts are written again here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import read_qwen2_decoder
from rlens_jax.families.siglip import SIGLIP, SiglipConfig, SiglipTower, read_siglip
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import LayerNorm, Linear
from rlens_jax.ops.attention import masked_attention

VERSION = 2.6
"""MiniCPM-V 2.0 to 4.5 share one `model_type` and differ in this field."""
DEFAULTS = {"version": None, "drop_vision_last_layer": True, "query_num": 64}
"""Of the class in the published code."""
RESAMPLER_HEAD_DIM = 128
RESAMPLER_NORM_EPS = 1e-6
RESAMPLER_THETA = 10000.0


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of the connector, which makes `num_queries` visual tokens of each view."""

    num_queries: int
    in_width: int
    width: int

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "q": self.num_queries,
            "E": self.in_width,
            "D": self.width,
            "m": self.width,
            "N": self.width // RESAMPLER_HEAD_DIM,
            "H": RESAMPLER_HEAD_DIM,
        }


@dataclass(frozen=True)
class MiniCPMVConfig:
    """Everything that shapes a MiniCPM-V 2.6 model."""

    decoder: DecoderConfig
    vision: SiglipConfig
    resampler: ResamplerConfig


def read_config(config: ConfigReader) -> MiniCPMVConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    config = ConfigReader(config.fields, config.where, DEFAULTS)
    config.require("version", VERSION, str(VERSION))
    config.require("drop_vision_last_layer", False)
    config.require("slice_mode", True)
    decoder, vision = read_qwen2_decoder(config), read_siglip(config.section("vision_config", SIGLIP))
    if decoder.width % RESAMPLER_HEAD_DIM:
        raise UserError(
            f"{config.where}: hidden_size = {decoder.width} must be a multiple of {RESAMPLER_HEAD_DIM}, "
            "the head size of the resampler"
        )
    resampler = ResamplerConfig(config.size("query_num"), vision.width, decoder.width)
    return MiniCPMVConfig(decoder, vision, resampler)


class Resampler(nnx.Module):
    """Cross-attention of learned queries to the patches of a view; keys have 2-D sine and cosine positions, values do not."""

    def __init__(self, config: ResamplerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, width = config.sizes, config.width
        shape = (config.num_queries, width)
        self.config = config
        self.query = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(0.02, dtype))
        self.kv_proj = Linear("IJE,Em->IJm", sizes, dtype=dtype, rngs=rngs)
        self.query_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.kv_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.q_proj = Linear("qm,mNH->qNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.k_proj = Linear("IJm,mNH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.v_proj = Linear("IJm,mNH->IJNH", sizes, bias="NH", dtype=dtype, rngs=rngs)
        self.o_proj = Linear("INqH,NHm->Iqm", sizes, bias="m", dtype=dtype, rngs=rngs)
        self.post_norm = LayerNorm(width, eps=RESAMPLER_NORM_EPS, dtype=dtype)
        self.proj = Linear("Iqm,mD->IqD", sizes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "I J E"], places: Int[Array | np.ndarray, "I J 2"], num_patches: Int[Array | np.ndarray, " I"]
    ) -> Float[Array, "I q D"]:
        """Visual tokens of each view.

        Args:
            x: states of the tower; padding may hold any finite numbers.
            places: row and column of each patch in its view.
            num_patches: number of real patches of each view.
        """
        images, patches, _ = x.shape
        values = self.kv_norm(self.kv_proj(x))
        keys = values + sincos_positions(places, self.config.width).astype(values.dtype)
        q = self.q_proj(self.query_norm(self.query[...])).swapaxes(0, 1)
        k, v = self.k_proj(keys).swapaxes(1, 2), self.v_proj(values).swapaxes(1, 2)
        is_patch = jnp.arange(patches)[None] < num_patches[:, None]
        mask = jnp.broadcast_to(is_patch[:, None], (images, q.shape[1], patches))
        attended = masked_attention(jnp.broadcast_to(q[None], (images, *q.shape)), k, v, mask)
        return self.proj(self.post_norm(self.o_proj(attended)))


def sincos_positions(places: Int[Array | np.ndarray, "I J 2"], width: int) -> Float[Array, "I J m"]:
    """Position embeddings by row and column, float32: sines and cosines of the column, then of the row."""
    quarter = width // 4
    frequency = 1.0 / RESAMPLER_THETA ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = jnp.asarray(places, jnp.float32)[..., None] * frequency[None, None, None]
    row, column = angles[:, :, 0], angles[:, :, 1]
    return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], axis=-1)


class VisionTower(nnx.Module):
    """Views to visual tokens: SigLIP, its last norm, and the resampler (the connector)."""

    def __init__(self, config: MiniCPMVConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.tower = SiglipTower(config.vision, dtype=dtype, rngs=rngs)
        self.post_norm = LayerNorm(config.vision.width, eps=config.vision.norm_eps, dtype=dtype)
        self.resampler = Resampler(config.resampler, dtype=dtype, rngs=rngs)

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        position_ids: Int[Array | np.ndarray, "I J"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """Input of the resampler for one view of each image; the arguments are those of `SiglipTower`."""
        return self.post_norm(self.tower(patches, position_ids, num_patches))

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I v J c"],
        position_ids: Int[Array | np.ndarray, "I v J"],
        places: Int[Array | np.ndarray, "I v J 2"],
        num_patches: Int[Array | np.ndarray, "I v"],
    ) -> Float[Array, "I vq D"]:
        """Visual tokens of each image, view after view; those of padding views are meaningless."""

        def encode(view: tuple[Array, ...]) -> Array:
            patches, position_ids, places, num_patches = view
            return self.resampler(self.features(patches, position_ids, num_patches), places, num_patches)

        # One view of each image at a time: ten views together would need ten times the memory.
        arrays = (jnp.asarray(array) for array in (patches, position_ids, places, num_patches))
        tokens = jax.lax.map(encode, tuple(array.swapaxes(0, 1) for array in arrays)).swapaxes(0, 1)
        return tokens.reshape(len(tokens), -1, tokens.shape[-1])
