"""Published names of InternVL in the native layout and in that of transformers, older and newer spellings."""

from dataclasses import replace

from rlens_jax.families.internvl.model import InternVLConfig, VisionConfig
from rlens_jax.families.table import EMBEDDING, HEAD, QKV, Ignored, Part, Row, Table, decoder_parts, linear, norm, pattern_sizes
from rlens_jax.models.decoder import DecoderConfig

LANGUAGE = "language_model."
RENAMES = (
    (r"^lm_head\.", LANGUAGE + "lm_head."),
    (r"^model\.language_model\.", LANGUAGE + "model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
"""From the names of newer versions of transformers to those of its published checkpoints; native names do not change."""
NAMES = {
    "tower": ("vision_model.", "vision_tower."),
    "class": ("class_embedding", "cls_token"),
    "position": ("position_embedding", "position_embeddings"),
    "patch": ("patch_embedding", "patch_embeddings.projection"),
    "layer": ("encoder.layers.{layer}.", "encoder.layer.{layer}."),
    "norm1": ("norm1", "layernorm_before"),
    "norm2": ("norm2", "layernorm_after"),
    "scale1": ("ls1", "lambda_1"),
    "scale2": ("ls2", "lambda_2"),
    "attention": ("attn.", "attention."),
    "proj": ("proj", "projection_layer"),
    "connector": ("mlp1.", "multi_modal_projector."),
    "connector_norm": ("0", "layer_norm"),
    "connector_fc1": ("1", "linear_1"),
    "connector_fc2": ("3", "linear_2"),
}
"""Names in the native layout and in that of transformers."""
INTERNLM2 = {
    EMBEDDING: "model.tok_embeddings.weight",
    HEAD: "output.weight",
    "model.norm.weight": "model.norm.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}
"""From a Llama's names to those of InternLM2."""
QUERIES, KEYS = "group d k h -> d (k group) h", "1 d k h -> d k h"


def table(config: InternVLConfig) -> Table:
    """The mapping for a model of these sizes."""
    internlm2 = config.native is not None and config.text_model == "internlm2"
    text = _internlm2_parts(config.decoder) if internlm2 else decoder_parts(config.decoder)
    embedding, head = (LANGUAGE + (INTERNLM2[x] if internlm2 else x) for x in (EMBEDDING, HEAD))
    return Table(
        parts=(
            *_vision_parts(config.vision, native=config.native is not None),
            *(replace(part, source=LANGUAGE + part.source) for part in text),
        ),
        renames=RENAMES,
        ignored=(Ignored(r".*\.rotary_emb\.inv_freq", "rotary frequencies follow from config.json"),),
        copies={head: embedding} if config.decoder.tied_head else None,
    )


def _vision_parts(vision: VisionConfig, *, native: bool) -> tuple[Part, ...]:
    names = {key: pair[0 if native else 1] for key, pair in NAMES.items()}
    side, at = vision.patch_size, names["attention"]
    patch = {"channel": vision.channels, "row": side, "col": side, "position": 1 + vision.num_patches}
    sizes = pattern_sizes(vision.sizes) | patch
    if native:
        qkv = linear(f"{at}qkv", QKV, "(three n h) e -> three e n h", bias=vision.qkv_bias)
    else:
        qkv = tuple(row for x in QKV for row in linear(at + x, x, "(n h) e -> e n h", bias=vision.qkv_bias))
    if vision.qk_norm:
        qkv += tuple(row for x in ("q_norm", "k_norm") for row in norm(at + x, x, "e", bias=False))
    return (
        Part(
            names["tower"] + "embeddings.",
            "vision.",
            sizes,
            (
                Row(names["class"], "class_token", "1 1 e -> e"),
                Row(names["position"], "position", "1 position e -> position e"),
                *linear(names["patch"], "patch_embed", "e channel row col -> (channel row col) e"),
            ),
        ),
        Part(
            names["tower"] + names["layer"],
            "vision.layers.",
            sizes,
            (
                *norm(names["norm1"], "attention_norm", "e", bias=not vision.rms_norm),
                *qkv,
                *linear(f"{at}{names['proj']}", "o_proj", "e (n h) -> n h e"),
                Row(names["scale1"], "attention_scale", "e -> e"),
                *norm(names["norm2"], "mlp_norm", "e", bias=not vision.rms_norm),
                *linear("mlp.fc1", "fc1", "f e -> e f"),
                *linear("mlp.fc2", "fc2", "e f -> f e"),
                Row(names["scale2"], "mlp_scale", "e -> e"),
            ),
            vision.depth,
        ),
        Part(
            names["connector"],
            "vision.",
            sizes,
            (
                *norm(names["connector_norm"], "connector_norm", "g"),
                *linear(names["connector_fc1"], "connector_fc1", "m g -> g m"),
                *linear(names["connector_fc2"], "connector_fc2", "d m -> m d"),
            ),
        ),
    )


def _internlm2_parts(config: DecoderConfig) -> tuple[Part, ...]:
    """InternLM2 is a Llama with other names, and q, k and v of each kv head are fused."""
    fused = Row(
        "attention.wqkv.weight", tuple(f"attention.{x}.kernel" for x in QKV), "(k all h) d -> all d k h", (QUERIES, KEYS, KEYS)
    )
    split = tuple(f"self_attn.{x}.weight" for x in QKV)

    def renamed(part: Part) -> Part:
        rows = (row for row in part.rows if row.source not in split)
        return replace(part, rows=tuple(replace(row, source=INTERNLM2[row.source]) for row in rows))

    outer, layers = map(renamed, decoder_parts(config))
    sizes = {**layers.sizes, "group": config.num_heads // config.num_kv_heads}
    return outer, replace(layers, rows=(*layers.rows, fused), sizes=sizes)
