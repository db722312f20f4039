"""Reading the sizes of a decoder from config.json, where transformers 5.24 takes them from.

Published files are flat, or nest the decoder's fields in a section. Files that transformers saved again have both forms at
once, or `rope_parameters` in place of `rope_scaling` and `rope_theta`.
"""

from collections.abc import Mapping
from dataclasses import replace

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import MOST_LAYERS, MOST_TOKENS, ConfigReader
from rlens_jax.models.decoder import DecoderConfig

MOST_THETA = 1e12
"""Known models have at most 1e9."""
QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""Defaults of Qwen2Config in transformers, the same from 4.45 to 5.24."""
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False}
"""Defaults of Qwen3Config in transformers, the same from 4.51 to 5.24."""
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Defaults of LlamaConfig in transformers, the same from 4.45 to 5.24."""
MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
"""Defaults of MistralConfig in transformers, the same from 4.45 to 5.24. Published files switch the window off with null."""


def read_qwen2_decoder(text: ConfigReader) -> DecoderConfig:
    """Read the sizes of a Qwen2 decoder: biases on q, k and v only, SwiGLU, RMSNorm, plain RoPE. UserError as `read_decoder`."""
    text = ConfigReader(text.fields, text.where, QWEN2)
    return read_decoder(text, ("default",), qkv_bias=True, tied_head=text.flag("tie_word_embeddings"))


def read_qwen3_decoder(
    text: ConfigReader, rope_types: tuple[str, ...], *, tied_head: bool, rope_sections: tuple[int, ...] | None = None
) -> DecoderConfig:
    """Read the sizes of a Qwen3 decoder: no biases, q and k normed per head, N * H not D, and interleaved sections of mRoPE.

    Arguments and errors are those of `read_decoder`.
    """
    text.require("attention_bias", False)
    return read_decoder(
        text,
        rope_types,
        qkv_bias=False,
        qk_norm=True,
        tied_head=tied_head,
        rope_sections=rope_sections,
        rope_interleaved=rope_sections is not None,
    )


def read_llama_decoder(text: ConfigReader) -> DecoderConfig:
    """Read the sizes of a Llama or a Mistral, by `model_type`: no biases, SwiGLU, RMSNorm, plain RoPE.

    UserError as `read_decoder`. A sliding window changes no sequence that fits into it, so it only limits the context.
    """
    mistral = text.require("model_type", "llama", "mistral") == "mistral"
    text = ConfigReader(text.fields, text.where, MISTRAL if mistral else LLAMA)
    for name in () if mistral else ("attention_bias", "mlp_bias"):
        text.require(name, False)
    decoder = read_decoder(text, ("default",), qkv_bias=False, tied_head=text.flag("tie_word_embeddings"))
    if not mistral:
        return decoder
    window = text.size("sliding_window", null=decoder.context, most=MOST_TOKENS)
    return replace(decoder, context=min(decoder.context, window))


def read_decoder(
    text: ConfigReader,
    rope_types: tuple[str, ...],
    *,
    qkv_bias: bool,
    qk_norm: bool = False,
    tied_head: bool,
    rope_sections: tuple[int, ...] | None = None,
    rope_interleaved: bool = False,
) -> DecoderConfig:
    """Read the sizes of a decoder of the kind of Qwen2 and Llama (SwiGLU, RMSNorm, full attention).

    Args:
        text: the fields of the decoder, with the defaults of its class.
        rope_types: kinds of RoPE scaling that change nothing, as the family uses the decoder.
        qkv_bias: whether q, k and v have biases; no other linear map has one.
        qk_norm: whether each head of q and k goes through an RMSNorm.
        tied_head: read by the caller, because families store it in different places.
        rope_sections: default of mRoPE's sections; None for plain RoPE, which has no sections.
        rope_interleaved: whether the sections are interleaved.

    Raises:
        UserError: a field is missing or asks for what is not supported.
    """
    text.require("hidden_act", "silu")
    text.require("use_sliding_window", False, None)
    width, heads = text.size("hidden_size"), text.size("num_attention_heads")
    kv_heads = text.size("num_key_value_heads", default=text.defaults.get("num_key_value_heads", heads), null=heads)
    if width < heads:
        raise UserError(f"{text.where}: hidden_size {width} is smaller than num_attention_heads {heads}")
    head_dim = text.size("head_dim", default=text.defaults.get("head_dim", width // heads), null=width // heads)
    if heads % kv_heads:
        raise UserError(f"{text.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise UserError(f"{text.where}: the head dim, {head_dim}, must be even for RoPE")
    num_layers = text.size("num_hidden_layers", most=MOST_LAYERS)
    layer_types = text.fields.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * num_layers:
        raise text.error("layer_types", f"must be {num_layers} times 'full_attention'", layer_types)
    rope = rope_fields(text)
    rope.require("rope_type", *rope_types)
    rope.require("partial_rotary_factor", 1.0, None)
    rope.require("mrope_interleaved", rope_interleaved)
    return DecoderConfig(
        num_layers=num_layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=text.size("intermediate_size"),
        vocabulary=text.size("vocab_size"),
        context=text.size("max_position_embeddings", most=MOST_TOKENS),
        norm_eps=text.number("rms_norm_eps", most=1),
        rope_theta=rope.number("rope_theta", most=MOST_THETA),
        rope_sections=(head_dim // 2,) if rope_sections is None else _sections(rope, rope_sections, head_dim // 2),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_head=tied_head,
        rope_interleaved=rope_interleaved,
    )


def rope_fields(text: ConfigReader) -> ConfigReader:
    """The fields of RoPE: those in `rope_scaling`, or else in `rope_parameters`; those beside it are their defaults.

    Raises:
        UserError: they are no object, or each type of layers has its own.
    """
    name = "rope_scaling" if text.fields.get("rope_scaling") else "rope_parameters"
    scaling = {} if text.fields.get(name) is None else text.section(name).fields
    nested = next((key for key, value in scaling.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise UserError(f"{text.where}: {name}: {nested} is an object; RoPE by type of layer is not supported")
    beside = {key: text.fields[key] for key in ("rope_theta", "partial_rotary_factor") if key in text.fields}
    kind = scaling.get("type", "default")
    return ConfigReader(scaling, f"{text.where}: {name}", {**text.defaults, **beside, "rope_type": kind})


def _sections(rope: ConfigReader, default: tuple[int, ...], half: int) -> tuple[int, ...]:
    sections = rope.fields.get("mrope_section", list(default))
    counts = isinstance(sections, list) and all(isinstance(size, int) and size > 0 for size in sections)
    if not counts or len(sections) != len(default) or sum(sections) != half:
        raise rope.error("mrope_section", f"must be {len(default)} sizes that sum to half the head dim, {half}", sections)
    return tuple(sections)
