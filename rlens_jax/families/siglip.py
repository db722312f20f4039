"""Vision towers: what those of all families share, and SigLIP (arXiv 2303.15343), the tower of LLaVA-OneVision and MiniCPM-V.

The families of SigLIP cut images into patches and choose the position embedding of each patch. Both come as data, so padding
patches and grids of any proportions need no shapes of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_CHANNELS, MOST_LAYERS, MOST_PIXELS, ConfigReader
from rlens_jax.families.table import QKV, Part, Row, linear, norm, pattern_sizes
from rlens_jax.families.tower_marks import Marks, marked_layer, received_marks, tower_layer
from rlens_jax.flops import TowerAttention
from rlens_jax.models.decoder import layer_at
from rlens_jax.models.layers import LayerNorm, Linear, RMSNorm
from rlens_jax.ops.tower_attention import attend_groups


@dataclass(frozen=True)
class TowerConfig:
    """Sizes that the towers of all families have; a patch has channels x patch_size x patch_size numbers."""

    depth: int
    width: int
    num_heads: int
    ffn_width: int
    channels: int
    patch_size: int

    @property
    def sizes(self) -> dict[str, int]:
        head_dim, patch = self.width // self.num_heads, self.channels * self.patch_size**2
        return {"c": patch, "E": self.width, "N": self.num_heads, "H": head_dim, "F": self.ffn_width}


def tower_attention(config: TowerConfig, *, class_token: bool, patches: int, view: int | None) -> TowerAttention:
    """See `Family.attention`."""
    return TowerAttention(config.width, config.width // config.num_heads, class_token, patches, view)


def tower_sizes(vision: ConfigReader) -> dict[str, int]:
    """Sizes of a `vision_config` under the names of transformers, except `patch_size`."""
    width, heads = vision.size("hidden_size"), vision.size("num_attention_heads")
    if width % heads:
        raise UserError(f"{vision.where}: hidden_size {width} is no multiple of num_attention_heads {heads}")
    return {
        "depth": vision.size("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "num_heads": heads,
        "ffn_width": vision.size("intermediate_size"),
        "channels": vision.size("num_channels", most=MOST_CHANNELS),
    }


class TowerLayer(nnx.Module):
    """Parameters of full attention within one image and of an MLP, each after a norm; subclasses do the computation."""

    def __init__(
        self, config: TowerConfig, norm: Callable[[], LayerNorm | RMSNorm], *, qkv_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        sizes, bias = config.sizes, "NH" if qkv_bias else ""
        self.attention_norm = norm()
        self.q_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear("IJE,ENH->IJNH", sizes, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear("INJH,NHE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.fc1 = Linear("IJE,EF->IJF", sizes, bias="F", dtype=dtype, rngs=rngs)
        self.fc2 = Linear("IJF,FE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)

    def attend(self, x: Float[Array, "I J E"], group: Int[Array, "I J"]) -> Float[Array, "I J E"]:
        """Add attention to the patches of the same image with the same `group` number."""
        y = self.attention_norm(x)
        q, k, v = (project(y).swapaxes(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        return x + self.o_proj(attend_groups(q, k, v, group))


def image_groups(num_patches: Int[Array | np.ndarray, " I"], slots: int) -> Int[Array, "I slots"]:
    """The group numbers of padded images: 0 for their patches, which come first, 1 for padding."""
    return (jnp.arange(slots)[None] >= num_patches[:, None]).astype(jnp.int32)


def run_layers(layers: nnx.Module, x: Float[Array, "I J E"], *inputs: PyTree) -> Float[Array, "I J E"]:
    """Apply stacked layers one after another, each to the states and `inputs`."""
    graph, stack = nnx.split(layers)

    def body(x: Array, layer: PyTree) -> tuple[Array, None]:
        return nnx.merge(graph, layer)(x, *inputs), None

    return jax.lax.scan(body, x, stack)[0]


def run_span(
    layers: nnx.Module, first: int | Int[Array, ""], count: int, x: Float[Array, "I J E"], *inputs: PyTree
) -> Float[Array, "I J E"]:
    """As `run_layers`, of `count` layers from number `first` on; they are read where they are in the stack."""
    graph, stack = nnx.split(layers)
    return jax.lax.fori_loop(0, count, lambda i, x: nnx.merge(graph, layer_at(stack, first + i))(x, *inputs), x)


def run_marked(
    layers: nnx.Module,
    depth: int,
    x: Float[Array, "I J E"],
    inputs: tuple[PyTree, ...],
    marks: Callable[[Any, Float[Array, "I J E"]], Float[Array, "I patches marks"]],
) -> tuple[Float[Array, "I J E"], Float[Array, "I patches marks"]]:
    """As `run_layers`, and `marks(layer, x)` of the marked layer and the states that enter it; a class token has no marks."""
    number = marked_layer(depth)
    x = run_span(layers, 0, number, x, *inputs)
    made = marks(tower_layer(layers, number), x)
    return run_span(layers, number, depth - number, x, *inputs), made


@dataclass(frozen=True)
class SiglipConfig(TowerConfig):
    """Sizes and constants of SigLIP."""

    num_positions: int
    """Rows of the position table: the patches of a square image of `image_size` pixels per side."""
    norm_eps: float


SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""Defaults of SiglipVisionConfig in transformers, the same from 4.45 to 5.24."""


def read_siglip(vision: ConfigReader) -> SiglipConfig:
    """Read the sizes from a `vision_config` with these defaults; UserError if it asks for what is not supported."""
    vision.require("hidden_act", "gelu_pytorch_tanh")
    patch_size, image_size = vision.size("patch_size", most=MOST_PIXELS), vision.size("image_size", most=MOST_PIXELS)
    if image_size < patch_size:
        raise UserError(f"{vision.where}: image_size {image_size} is smaller than patch_size {patch_size}")
    return SiglipConfig(
        **tower_sizes(vision),
        patch_size=patch_size,
        num_positions=(image_size // patch_size) ** 2,
        norm_eps=vision.number("layer_norm_eps", most=1),
    )


class SiglipLayer(TowerLayer):
    """Attention and a GELU MLP."""

    def __init__(self, config: SiglipConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(LayerNorm, config.width, eps=config.norm_eps, dtype=dtype)
        super().__init__(config, norm, qkv_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "I J E"], group: Int[Array, "I J"]) -> Float[Array, "I J E"]:
        x = self.attend(x, group)
        return x + self.fc2(jax.nn.gelu(self.fc1(self.mlp_norm(x)), approximate=True))


class SiglipTower(nnx.Module):
    """Patch and position embeddings, and stacked layers. No family uses the norm or the head that follow them."""

    def __init__(self, config: SiglipConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes = config.sizes
        self.depth = config.depth
        self.patch_embed = Linear("IJc,cE->IJE", sizes, bias="E", dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (config.num_positions, config.width), dtype) * jnp.asarray(0.02, dtype)
        )
        make = nnx.vmap(lambda rngs: SiglipLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.depth))

    def __call__(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        position_ids: Int[Array | np.ndarray, "I J"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> Float[Array, "I J E"]:
        """States after the last layer, before any norm; those of padding patches are meaningless.

        Args:
            patches: pixel values of each patch in (channel, row, column) order; padding may hold any finite numbers.
            position_ids: row of the position table for each patch.
            num_patches: number of real patches of each image; they come first.
        """
        return run_layers(self.layers, *self._entering(patches, position_ids, num_patches))

    def marked(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        position_ids: Int[Array | np.ndarray, "I J"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> tuple[Float[Array, "I J E"], Marks]:
        """The same states, and marks by the attention that patches receive in the block before the last."""
        x, group = self._entering(patches, position_ids, num_patches)

        def marks(layer: Any, x: Float[Array, "I J E"]) -> Marks:
            y = layer.attention_norm(x)
            q, k = (project(y).swapaxes(1, 2) for project in (layer.q_proj, layer.k_proj))
            return received_marks(q, k, group, jnp.asarray(num_patches))

        return run_marked(self.layers, self.depth, x, (group,), marks)

    def _entering(
        self,
        patches: Float[Array | np.ndarray, "I J c"],
        position_ids: Int[Array | np.ndarray, "I J"],
        num_patches: Int[Array | np.ndarray, " I"],
    ) -> tuple[Float[Array, "I J E"], Int[Array, "I J"]]:
        """States before the first layer, and their group numbers."""
        x = self.patch_embed(jnp.asarray(patches, self.patch_embed.kernel.dtype))
        return x + self.position_embedding[...][position_ids], image_groups(num_patches, patches.shape[1])


def siglip_parts(config: SiglipConfig, source: str, target: str) -> tuple[Part, ...]:
    """Rows of a mapping table for the tower, from names with the prefix `source` to paths with the prefix `target`."""
    patch = {"channel": config.channels, "row": config.patch_size, "col": config.patch_size}
    sizes = pattern_sizes(config.sizes) | patch | {"position": config.num_positions}
    return (
        Part(
            f"{source}embeddings.",
            target,
            sizes,
            (
                *linear("patch_embedding", "patch_embed", "e channel row col -> (channel row col) e"),
                Row("position_embedding.weight", "position_embedding", "position e -> position e"),
            ),
        ),
        tower_layer_part(config, source, target),
    )


def tower_layer_part(config: TowerConfig, source: str, target: str) -> Part:
    """Rows of the layers of a tower under the names that SigLIP and CLIP have in transformers."""
    return Part(
        f"{source}encoder.layers.{{layer}}.",
        f"{target}layers.",
        pattern_sizes(config.sizes),
        (
            *norm("layer_norm1", "attention_norm", "e"),
            *(row for name in QKV for row in linear(f"self_attn.{name}", name, "(n h) e -> e n h")),
            *linear("self_attn.out_proj", "o_proj", "e (n h) -> n h e"),
            *norm("layer_norm2", "mlp_norm", "e"),
            *linear("mlp.fc1", "fc1", "f e -> e f"),
            *linear("mlp.fc2", "fc2", "e f -> f e"),
        ),
        config.depth,
    )
