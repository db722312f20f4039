"""config.json of the published checkpoints of each family."""

from pathlib import Path

from rlens_jax.families.registry import ModelKind, read_kind

FACTS = Path(__file__).parents[2].parent / "shared" / "checkpoints"
"""Names and shapes of published tensors, where the work place has them."""

QWEN2_VL_SIZES = {
    "qwen2-vl-2b": {"L": 28, "D": 1536, "F": 8960, "N": 12, "K": 2, "V": 151936, "tied": True, "numbers": 2208985600},
    "qwen2-vl-7b": {"L": 28, "D": 3584, "F": 18944, "N": 28, "K": 4, "V": 152064, "tied": False, "numbers": 16582751232 // 2},
}
"""Sizes and number of parameters; the 7B file is published in bfloat16 with 16582751232 bytes."""


def qwen2_vl(sizes: dict) -> dict:
    return {
        "model_type": "qwen2_vl",
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": sizes["L"],
        "num_attention_heads": sizes["N"],
        "num_key_value_heads": sizes["K"],
        "vocab_size": sizes["V"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": sizes["tied"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14},
    }


QWEN2_5_VL_SIZES = {
    "qwen2.5-vl-3b": {"L": 36, "D": 2048, "F": 11008, "N": 16, "K": 2, "V": 151936, "tied": True, "numbers": 3754622976},
    "qwen2.5-vl-7b": {"L": 28, "D": 3584, "F": 18944, "N": 28, "K": 4, "V": 152064, "tied": False, "numbers": 8292166656},
}


def qwen2_5_vl(sizes: dict) -> dict:
    """The published config.json, without what says nothing of the model."""
    fields = qwen2_vl(sizes) | {"model_type": "qwen2_5_vl", "max_position_embeddings": 128000}
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": sizes["D"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    }
    return fields | {"use_sliding_window": False, "sliding_window": 32768, "hidden_act": "silu", "vision_config": vision}


def qwen_decoder_shapes(sizes: dict) -> dict[str, list[int]]:
    """Names and shapes of the decoder of Qwen2-VL and Qwen2.5-VL, by rule; heads have 128 numbers."""
    width, kv, ffn = sizes["D"], sizes["K"] * 128, sizes["F"]
    shapes = {"model.embed_tokens.weight": [sizes["V"], width], "model.norm.weight": [width]}
    if not sizes["tied"]:
        shapes["lm_head.weight"] = [sizes["V"], width]
    for layer in range(sizes["L"]):
        for name, shape in {
            "input_layernorm.weight": [width],
            "post_attention_layernorm.weight": [width],
            "self_attn.q_proj.weight": [width, width],
            "self_attn.q_proj.bias": [width],
            "self_attn.k_proj.weight": [kv, width],
            "self_attn.k_proj.bias": [kv],
            "self_attn.v_proj.weight": [kv, width],
            "self_attn.v_proj.bias": [kv],
            "self_attn.o_proj.weight": [width, width],
            "mlp.gate_proj.weight": [ffn, width],
            "mlp.up_proj.weight": [ffn, width],
            "mlp.down_proj.weight": [width, ffn],
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


INTERNVL_VISION = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 448,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
QWEN3_SIZES = {
    "1b": {"D": 1024, "F": 3072, "L": 28, "N": 16},
    "4b": {"D": 2560, "F": 9728, "L": 36, "N": 32},
    "8b": {"D": 4096, "F": 12288, "L": 36, "N": 32},
}
"""Sizes of InternVL3.5's text models; K = 8, H = 128 and V = 151936 in all."""


QWEN3_VL_SIZES = {
    "qwen3-vl-8b": {
        "L": 36,
        "D": 4096,
        "F": 12288,
        "N": 32,
        "K": 8,
        "depth": 27,
        "E": 1152,
        "f": 4304,
        "tied": False,
        "numbers": 8767123696,
    },
    "qwen3-vl-4b": {
        "L": 36,
        "D": 2560,
        "F": 9728,
        "N": 32,
        "K": 8,
        "depth": 24,
        "E": 1024,
        "f": 4096,
        "tied": True,
        "numbers": 4437815808,
    },
    "qwen3-vl-2b": {
        "L": 28,
        "D": 2048,
        "F": 6144,
        "N": 16,
        "K": 8,
        "depth": 24,
        "E": 1024,
        "f": 4096,
        "tied": True,
        "numbers": 2127532032,
    },
}
"""Sizes and number of parameters."""


def qwen3_vl(sizes: dict) -> dict:
    """The published config.json, without what says nothing of the model."""
    text = {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "max_position_embeddings": 262144,
        "num_attention_heads": sizes["N"],
        "num_hidden_layers": sizes["L"],
        "num_key_value_heads": sizes["K"],
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    }
    vision = {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [8, 16, 24] if sizes["depth"] == 27 else [5, 11, 17],
        "depth": sizes["depth"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes["E"],
        "in_channels": 3,
        "intermediate_size": sizes["f"],
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": sizes["D"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": sizes["tied"],
        "text_config": text,
        "vision_config": vision,
    }


def internvl(name: str) -> dict:
    if name.startswith("internvl3_5"):
        return internvl3_5(name)
    if name == "internvl2-8b":
        return internvl_native(
            {
                "bias": False,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "model_type": "internlm2",
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_scaling": {"factor": 2.0, "type": "dynamic"},
                "rope_theta": 1000000,
                "tie_word_embeddings": False,
                "vocab_size": 92553,
            },
            "internlm2-chat",
        )
    return internvl_hf(
        {
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": 151674,
        },
        151667,
    )


def internvl3_5(name: str) -> dict:
    """Neither layout says whether the head is tied: the files have one."""
    sizes = QWEN3_SIZES[name.removeprefix("internvl3_5-").removesuffix("-hf")]
    text = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": sizes["N"],
        "num_hidden_layers": sizes["L"],
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return internvl_hf(text, 151671) if name.endswith("-hf") else internvl_native(text, "internvl2_5")


def internvl_native(text: dict, template: str) -> dict:
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": text,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "use_thumbnail": True,
        "vision_config": {**INTERNVL_VISION, "qk_normalization": False, "qkv_bias": True},
    }


def internvl_hf(text: dict, image_token: int) -> dict:
    square = {"image_size": [448, 448], "patch_size": [14, 14]}
    return {
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_token_id": image_token,
        "text_config": text,
        "vision_config": {**INTERNVL_VISION, **square, "attention_bias": True, "use_qk_norm": False},
    }


def llava_onevision(**overrides) -> dict:
    """The 7B model's, with the fields that transformers leaves out of nested configs left out."""
    return {
        "model_type": "llava_onevision",
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "vocab_size": 152128,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        "image_token_index": 151646,
        "video_token_index": 151647,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **overrides,
    }


CLIP_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
VICUNA_13B = VICUNA | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
MISTRAL = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}


def llava(text: dict, **overrides) -> dict:
    """LLaVA-1.5; the sections are sparse, as published."""
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
        **overrides,
    }


def llava_next(text: dict, **overrides) -> dict:
    """LLaVA-NeXT."""
    fields = {name: value for name, value in llava(text).items() if name not in ("pad_token_id", "tie_word_embeddings")}
    return {
        **fields,
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "use_image_newline_parameter": True,
        **overrides,
    }


MINICPM_V = {
    "model_type": "minicpmv",
    "version": 2.6,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 151666,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "drop_vision_last_layer": False,
    "slice_mode": True,
    "query_num": 64,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "siglip",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


BY_MODEL_TYPE = {
    "internvl": internvl("internvl3-1b-hf"),
    "internvl_chat": internvl("internvl2-8b"),
    "llava": llava(VICUNA),
    "llava_next": llava_next(MISTRAL),
    "llava_onevision": llava_onevision(),
    "minicpmv": MINICPM_V,
    "qwen2_vl": qwen2_vl(QWEN2_VL_SIZES["qwen2-vl-7b"]),
    "qwen2_5_vl": qwen2_5_vl(QWEN2_5_VL_SIZES["qwen2.5-vl-7b"]),
    "qwen3_vl": qwen3_vl(QWEN3_VL_SIZES["qwen3-vl-8b"]),
}
"""One published checkpoint per `model_type`."""


def kind_of(model_type: str) -> ModelKind:
    """A published model of this `model_type`."""
    return read_kind(BY_MODEL_TYPE[model_type], "config.json")
