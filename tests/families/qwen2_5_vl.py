"""A tiny Qwen2.5-VL of Hugging Face, and a model folder of random weights without PyTorch."""

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

FULL_LAYERS = [2]
WINDOW = 9
"""Pixels a side: windows of 2 x 2 visual tokens of 4 x 4 pixels; a rest is dropped."""


def tiny_qwen2_5_vl(seed: int, **overrides) -> torch.nn.Module:
    """A Qwen2_5_VLForConditionalGeneration of distinct sizes: float32, eager attention, every parameter redrawn.

    `overrides` are those of `tests.torch_support.tiny_qwen2_vl`.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = VISION | {
        "depth": 4,
        "hidden_size": 24,
        "intermediate_size": 29,
        "out_hidden_size": overrides.get("hidden_size", TEXT["hidden_size"]),
        "window_size": WINDOW,
        "fullatt_block_indexes": FULL_LAYERS,
    }
    return tiny_qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TEXT, vision, seed, **overrides)


def save_random(folder: Path) -> Path:
    """A published folder with the texts and image processor of the embedded model, in their early spelling."""
    fields = json.loads((embedded_model() / "config.json").read_text())
    vision = {
        "depth": 3,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 22,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 24,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = {
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    fields |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": vision}
    fields |= text | rope
    kind = read_kind(fields, "config.json")
    model = kind.family.model(kind.config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    save_hf(folder, model, fields)
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"image_processor_type": "Qwen2_5_VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
