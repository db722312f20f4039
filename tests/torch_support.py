"""Tiny random PyTorch models of the supported families, to compare with."""

from pathlib import Path

import torch


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Redraws every parameter: fresh models have biases of 0 and norm weights of 1, which hide lost ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                noise = 0.3 * noise
            elif parameter.ndim == 1:
                noise = 1 + 0.3 * noise.clamp(-2, 2)
            elif "embed_tokens" not in name and "lm_head" not in name:
                noise = noise * parameter[0].numel() ** -0.5
            elif "lm_head" in name or model.config.tie_word_embeddings:
                noise = noise * 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(noise)


TEXT = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]},
    "bos_token_id": 190,
    "eos_token_id": 191,
    "pad_token_id": 190,
}
VISION = {"depth": 3, "num_heads": 3, "in_channels": 3, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}


def tiny_qwen2_vl(seed: int, **overrides) -> torch.nn.Module:
    """A Qwen2VLForConditionalGeneration of distinct sizes: float32, eager attention, every parameter redrawn.

    Args:
        seed: of the parameters.
        overrides: fields of the text config, `vision_config=dict(...)` with fields of the vision config, or
            the top-level `tie_word_embeddings`.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    width = overrides.get("hidden_size", TEXT["hidden_size"])
    vision = VISION | {"embed_dim": 24, "hidden_size": width, "mlp_ratio": 3}
    return tiny_qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, TEXT, vision, seed, **overrides)


def tiny_qwen(config_class: type, model_class: type, text: dict, vision: dict, seed: int, **overrides) -> torch.nn.Module:
    """A model of this family of Qwen; `overrides` are those of `tiny_qwen2_vl`."""
    tied = overrides.pop("tie_word_embeddings", False)
    vision = vision | overrides.pop("vision_config", {})
    config = config_class(
        text_config=text | overrides,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=195,
        video_token_id=196,
        vision_start_token_id=193,
        vision_end_token_id=194,
        attn_implementation="eager",
    )
    config.text_config.tie_word_embeddings = tied
    model = model_class(config)
    redraw(model, seed)
    return model.eval()


def save_tiny(folder: Path, model: torch.nn.Module, **options) -> Path:
    """`model.save_pretrained(folder, **options)`; `save_original_format=False` writes the newer prefixes."""
    model.save_pretrained(folder, **options)
    return folder
