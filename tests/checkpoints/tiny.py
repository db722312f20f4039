"""Tiny Qwen2-VL checkpoints made without PyTorch, and ways to damage them."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from rlens_jax.checkpoints.leaves import arrays_of
from rlens_jax.families.registry import read_kind


def fields(**overrides) -> dict:
    """config.json as published (flat), sizes all different."""
    return {
        "model_type": "qwen2_vl",
        "hidden_size": 30,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 23,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "image_token_id": 20,
        "video_token_id": 21,
        "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 3, "patch_size": 2},
        **overrides,
    }


def model(config_json: dict, seed: int = 0, dtype=jnp.float32) -> nnx.Module:
    """A model whose parameters are all random, biases and norms too."""
    kind = read_kind(config_json, "config.json")
    made = kind.abstract(jnp.dtype(dtype))
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(generator.normal(size=leaf.shape).astype(leaf.dtype))

    nnx.update(made, jax.tree.map(draw, nnx.state(made, nnx.Param)))
    return made


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    """Bit-equal parameters, equal dtypes."""
    left, right = arrays_of(a), arrays_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrites model.safetensors after `edit` changed its tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
