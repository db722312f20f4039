"""Published names of a Qwen2 decoder, which families share; each brings its prefixes to these by renames."""

from rlens_jax.families.table import Part, Row
from rlens_jax.models.decoder import DecoderConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decoder_parts(config: DecoderConfig) -> tuple[Part, ...]:
    """Rows of embeddings, layers, norm and, if untied, head. Gate, up and down are [F, D], one row a unit."""
    sizes = {letter.lower(): size for letter, size in config.sizes.items()}
    head = () if config.tied_head else (Row(HEAD, "head", "v d -> v d"),)
    biases = (
        Row("self_attn.q_proj.bias", "attention.q_proj.bias", "(n h) -> n h"),
        Row("self_attn.k_proj.bias", "attention.k_proj.bias", "(k h) -> k h"),
        Row("self_attn.v_proj.bias", "attention.v_proj.bias", "(k h) -> k h"),
    )
    return (
        Part(
            "",
            "decoder.",
            sizes,
            (
                Row(EMBEDDING, "embedding", "v d -> v d"),
                Row("model.norm.weight", "norm.scale", "d -> d"),
                *head,
            ),
        ),
        Part(
            "model.layers.{layer}.",
            "decoder.layers.",
            sizes,
            (
                Row("input_layernorm.weight", "input_norm.scale", "d -> d"),
                Row("self_attn.q_proj.weight", "attention.q_proj.kernel", "(n h) d -> d n h"),
                Row("self_attn.k_proj.weight", "attention.k_proj.kernel", "(k h) d -> d k h"),
                Row("self_attn.v_proj.weight", "attention.v_proj.kernel", "(k h) d -> d k h"),
                *(biases if config.qkv_bias else ()),
                Row("self_attn.o_proj.weight", "attention.o_proj.kernel", "d (n h) -> n h d"),
                Row("post_attention_layernorm.weight", "ffn_norm.scale", "d -> d"),
                Row("mlp.gate_proj.weight", "ffn.gate_proj.kernel", "f d -> f d"),
                Row("mlp.up_proj.weight", "ffn.up_proj.kernel", "f d -> f d"),
                Row("mlp.down_proj.weight", "ffn.down_proj.kernel", "d f -> f d"),
            ),
            config.num_layers,
        ),
    )
