"""A tiny Qwen3-VL of Hugging Face, and a model folder of random weights without PyTorch."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import torch
from flax import nnx

from rlens_jax.checkpoints.published import save_hf
from rlens_jax.families.registry import read_kind
from rlens_jax.resources import embedded_model
from tests.torch_support import TEXT, VISION, tiny_qwen

DEEPSTACK = [0, 1, 2]
"""Blocks of four. So the layers with features are reduced by the contract's plan, each in another way."""


def tiny_qwen3_vl(seed: int, **overrides) -> torch.nn.Module:
    """A Qwen3VLForConditionalGeneration of distinct sizes: float32, eager attention, every parameter redrawn.

    84 numbers in the query heads, width 60. `overrides` are those of `tests.torch_support.tiny_qwen2_vl`.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = TEXT["rope_parameters"] | {"mrope_section": [3, 2, 2], "mrope_interleaved": True}
    text = TEXT | {"head_dim": 14, "rope_parameters": rope}
    vision = VISION | {
        "depth": 4,
        "hidden_size": 24,
        "intermediate_size": 29,
        "out_hidden_size": overrides.get("hidden_size", TEXT["hidden_size"]),
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": DEEPSTACK,
    }
    return tiny_qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, text, vision, seed, **overrides)


def save_random(folder: Path) -> Path:
    """A published folder with the texts and the image processor of the embedded model."""
    fields = json.loads((embedded_model() / "config.json").read_text())
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": fields["vocab_size"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 1], "rope_type": "default"},
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 22,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": fields["vision_config"]["patch_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    tokens = {name: fields[name] for name in ("image_token_id", "video_token_id")}
    fields = {"model_type": "qwen3_vl", "dtype": "float32", "tie_word_embeddings": False, **tokens}
    fields |= {"text_config": text, "vision_config": vision}
    kind = read_kind(fields, "config.json")
    model = kind.family.model(kind.config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    save_hf(folder, model, fields)
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder
