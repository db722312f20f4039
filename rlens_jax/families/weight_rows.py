"""Rows of mapping tables that families share: linear maps, norms, and the decoder by Qwen2's names."""

import re

from rlens_jax.families.table import Part, Row
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import Sizes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = ("q_proj", "k_proj", "v_proj")


def pattern_sizes(sizes: Sizes) -> dict[str, int]:
    """Sizes by lower-case letter, as the patterns of rows have them."""
    return {letter.lower(): size for letter, size in sizes.items()}


def linear(
    source: str, target: str | tuple[str, ...], pattern: str, *, separator: str = ".", bias: bool = True
) -> tuple[Row, ...]:
    """Weight and bias of a linear map, or of several that are published as one.

    Args:
        source: published name of the module.
        target: our module, or the modules of a fused weight.
        pattern: of the weight, whose first published axis is the output. "(n h) e -> e n h" and a bias
            "(n h) -> n h"; a fused one begins with "(three n h)".
        separator: between the name of the module and "weight" or "bias".
        bias: whether there is a bias.
    """
    output = re.match(r"\(.*?\)|\w+", pattern)
    assert output is not None

    def targets(name: str) -> str | tuple[str, ...]:
        return f"{target}.{name}" if isinstance(target, str) else tuple(f"{module}.{name}" for module in target)

    weight = Row(f"{source}{separator}weight", targets("kernel"), pattern)
    if not bias:
        return (weight,)
    return weight, Row(f"{source}{separator}bias", targets("bias"), f"{output[0]} -> {output[0].strip('()')}")


def norm(source: str, target: str, axis: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Scale and, for a LayerNorm, bias of a norm over one axis."""
    identity = f"{axis} -> {axis}"
    scale = Row(f"{source}.weight", f"{target}.scale", identity)
    return (scale, Row(f"{source}.bias", f"{target}.bias", identity)) if bias else (scale,)


def decoder_parts(config: DecoderConfig) -> tuple[Part, ...]:
    """Rows of embedding, layers, norm and, if untied, head; families bring their prefixes to these names by renames."""
    sizes = pattern_sizes(config.sizes)
    bias = config.qkv_bias
    return (
        Part(
            "",
            "decoder.",
            sizes,
            (
                Row(EMBEDDING, "embedding", "v d -> v d"),
                *norm("model.norm", "norm", "d", bias=False),
                *(() if config.tied_head else (Row(HEAD, "head", "v d -> v d"),)),
            ),
        ),
        Part(
            "model.layers.{layer}.",
            "decoder.layers.",
            sizes,
            (
                *norm("input_layernorm", "input_norm", "d", bias=False),
                *linear("self_attn.q_proj", "attention.q_proj", "(n h) d -> d n h", bias=bias),
                *linear("self_attn.k_proj", "attention.k_proj", "(k h) d -> d k h", bias=bias),
                *linear("self_attn.v_proj", "attention.v_proj", "(k h) d -> d k h", bias=bias),
                *linear("self_attn.o_proj", "attention.o_proj", "d (n h) -> n h d", bias=False),
                *norm("post_attention_layernorm", "ffn_norm", "d", bias=False),
                # [F, D] for all three: one row per unit.
                *linear("mlp.gate_proj", "ffn.gate_proj", "f d -> f d", bias=False),
                *linear("mlp.up_proj", "ffn.up_proj", "f d -> f d", bias=False),
                *linear("mlp.down_proj", "ffn.down_proj", "d f -> f d", bias=False),
            ),
            config.num_layers,
        ),
    )
