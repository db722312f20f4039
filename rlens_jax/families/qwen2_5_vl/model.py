"""Qwen2.5-VL's vision tower: most layers attend within windows of an image, the others to the whole image.

The layers see the patches window by window, so that the keys of a window stand together: a block of queries meets the keys around
it and no others. Like the sizes of an image, its windows are data. The patches are in their own order again before the merger.
"""

from dataclasses import dataclass
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.families.config_reader import MOST_PIXELS, ConfigReader
from rlens_jax.families.qwen2_vl.model import (
    VISION_NORM_EPS,
    VISION_ROPE_THETA,
    Groups,
    Qwen2VLConfig,
    RotaryLayer,
    States,
    VisionConfig,
    patch_sizes,
    read_qwen2_text,
    read_tokens,
    rotary_marks,
    spatial_rotation,
)
from rlens_jax.families.qwen2_vl.model import VisionTower as FullTower
from rlens_jax.families.siglip import image_groups, run_span
from rlens_jax.families.tower_marks import Marks, marked_layer, tower_layer
from rlens_jax.models.layers import Linear, RMSNorm, Rotary


@dataclass(frozen=True)
class WindowedConfig(VisionConfig):
    """Sizes of the tower; a window is `window` x `window` visual tokens, cut from the top left of an image."""

    window: int
    full_layers: tuple[int, ...]
    """Layers that attend to the whole image."""


@dataclass(frozen=True)
class Qwen25VLConfig(Qwen2VLConfig):
    """Everything that shapes a Qwen2.5-VL model."""

    vision: WindowedConfig


VISION = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "rope_theta": VISION_ROPE_THETA,
}
"""Defaults of Qwen2_5_VLVisionConfig in transformers 5.24. The decoder's are those of Qwen2-VL."""


def read_config(config: ConfigReader) -> Qwen25VLConfig:
    """Read the sizes from config.json; UserError if it asks for a computation that is not supported."""
    decoder = read_qwen2_text(config, "qwen2_5_vl")
    vision = _read_vision(config.section("vision_config", VISION), decoder.width)
    return Qwen25VLConfig(decoder, vision, **read_tokens(config, decoder.vocabulary))


def _read_vision(vision: ConfigReader, out_width: int) -> WindowedConfig:
    vision.require("model_type", "qwen2_5_vl_vision", "qwen2_5_vl")
    vision.require("hidden_act", "silu")
    vision.require("out_hidden_size", out_width)
    sizes, pixels = patch_sizes(vision, "hidden_size"), vision.size("window_size", most=MOST_PIXELS)
    window = pixels // sizes["merge_size"] // sizes["patch_size"]
    if window == 0:
        raise vision.error("window_size", f"must hold {sizes['merge_size']} x {sizes['merge_size']} patches", pixels)
    full = vision.fields.get("fullatt_block_indexes", vision.defaults["fullatt_block_indexes"])
    # Files that transformers saved keep the default numbers for a tower with fewer layers.
    most = max(sizes["depth"], vision.defaults["depth"])
    if not isinstance(full, list | tuple) or any(type(n) is not int or not 0 <= n < most for n in full):
        raise vision.error("fullatt_block_indexes", "must be a list of numbers of layers", full)
    return WindowedConfig(
        **sizes,
        ffn_width=vision.size("intermediate_size"),
        out_width=out_width,
        window=window,
        full_layers=tuple(layer for layer in range(sizes["depth"]) if layer in full),
    )


class VisionLayer(RotaryLayer):
    """Attention with 2-D RoPE to the window or the image, and a gated SiLU MLP: `gate` and `fc1` in, `fc2` out."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.width, eps=VISION_NORM_EPS, dtype=dtype)
        super().__init__(config, norm, qkv_bias=True, dtype=dtype, rngs=rngs)
        self.gate = Linear("IJE,EF->IJF", config.sizes, bias="F", dtype=dtype, rngs=rngs)

    def __call__(self, x: States, rotary: Rotary, group: Groups, most: int | None) -> States:
        x = self.mix(x, rotary, group, most)
        y = self.mlp_norm(x)
        return x + self.fc2(jax.nn.silu(self.gate(y)) * self.fc1(y))


class VisionTower(FullTower):
    """Patches to visual tokens: patch embedding, layers of two kinds, and the merger (the connector)."""

    config: WindowedConfig
    layer = VisionLayer
    norm = RMSNorm

    def features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """See `rlens_jax.families.qwen2_vl.model.VisionTower.features`."""
        return self._features(patches, places, num_patches, marks=False)[0]

    def marked_features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> tuple[Float[Array, "I J E"], Marks]:
        """See `rlens_jax.families.qwen2_vl.model.VisionTower.marked_features`; layers with windows attend within these."""
        x, marks = self._features(patches, places, num_patches, marks=True)
        assert marks is not None
        return x, marks

    def _features(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        places: Int[Array | np.ndarray, "I J 2"],
        num_patches: Int[Array | np.ndarray, " I"],
        *,
        marks: bool,
    ) -> tuple[Float[Array, "I J E"], Marks | None]:
        config, places = self.config, jnp.asarray(places)
        side = config.window * config.merge_size
        group = image_groups(num_patches, patches.shape[1])
        window = windows(places, group == 0, side)
        # Padding has the last window, so it stays behind the patches of each image.
        order = jnp.argsort(window, axis=1, stable=True)
        window = jnp.take_along_axis(window, order, axis=1)
        x = self.patch_embed(_ordered(jnp.asarray(patches, self.patch_embed.kernel.dtype), order))
        rotary = spatial_rotation(_ordered(places, order), config.width // config.num_heads)
        inside, whole = (window, side**2), (group, None)

        def period(x: States, first: int | Array, count: int) -> States:
            x = run_span(self.layers, first, count, x, rotary, *inside)
            return run_span(self.layers, first + count, 1, x, rotary, *whole)

        def run(x: States, layers: range) -> States:
            # Published towers repeat one period: a loop of it is compiled once, where a loop of each span takes minutes.
            first, full = layers.start, [layer for layer in config.full_layers if layer in layers]
            for count, alike in groupby(np.diff([first - 1, *full]).tolist()):
                times, begin = len(list(alike)), first
                x = jax.lax.fori_loop(0, times, lambda i, x, begin=begin, count=count: period(x, begin + i * count, count - 1), x)
                first += times * count
            return run_span(self.layers, first, layers.stop - first, x, rotary, *inside)

        back = jnp.argsort(order, axis=1)
        if not marks:
            return _ordered(run(x, range(config.depth)), back), None
        number = marked_layer(config.depth)
        x = run(x, range(number))
        seen, _ = whole if number in config.full_layers else inside
        made = rotary_marks(tower_layer(self.layers, number), x, rotary, seen, num_patches)
        return _ordered(run(x, range(number, config.depth)), back), _ordered(made, back)


def _ordered(x: Array, order: Int[Array, "I J"]) -> Array:
    return jnp.take_along_axis(x, order[..., None], axis=1)


def windows(places: Int[Array, "I J 2"], is_patch: Bool[Array, "I J"], side: int) -> Int[Array, "I J"]:
    """A number for the window of each patch of an image, which has `side` x `side` patches; the largest for padding."""
    window = places // side
    number = window[..., 0] * (places.shape[1] // side + 1) + window[..., 1]
    return jnp.where(is_patch, number, jnp.iinfo(jnp.int32).max)
