"""Sizes of the embedded model, as its Hugging Face config.json says them (our decision).

Twelve layers so that there is something to rank; widths small enough to train on two CPU cores.
"""

from typing import Any

from rlens_jax.demo.processor import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, TOKENS, special_ids


def embedded_config() -> dict[str, Any]:
    """config.json of the embedded model, in the layout that Hugging Face publishes for Qwen2-VL."""
    ids = special_ids()
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 8.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 2048,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "vocab_size": len(TOKENS),
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 1,
            "embed_dim": 64,
            "num_heads": 8,
            "mlp_ratio": 3,
            "in_chans": 3,
            "hidden_size": 128,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
    }
