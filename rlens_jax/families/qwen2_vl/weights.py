"""Published names of Qwen2-VL: `model.*`, `visual.*`, `lm_head`; newer transformers may write others."""

from rlens_jax.families.decoder_weights import EMBEDDING, HEAD, decoder_parts
from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.table import Ignored, Part, Row, Table

RENAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
QKV = ("q_proj", "k_proj", "v_proj")


def table(config: Qwen2VLConfig) -> Table:
    """The mapping for a model of these sizes."""
    vision = config.vision
    sizes = {letter.lower(): size for letter, size in vision.sizes.items()}
    side = vision.patch_size
    patch = {"channel": vision.channels, "time": vision.temporal_patch, "row": side, "col": side}
    return Table(
        parts=(
            *decoder_parts(config.decoder),
            Part(
                "visual.",
                "vision.",
                {**sizes, **patch},
                (
                    Row(
                        "patch_embed.proj.weight",
                        "patch_embed.kernel",
                        "e channel time row col -> (channel time row col) e",
                    ),
                    Row("merger.ln_q.weight", "merger_norm.scale", "e -> e"),
                    Row("merger.ln_q.bias", "merger_norm.bias", "e -> e"),
                    Row("merger.mlp.0.weight", "merger_fc1.kernel", "m g -> g m"),
                    Row("merger.mlp.0.bias", "merger_fc1.bias", "m -> m"),
                    Row("merger.mlp.2.weight", "merger_fc2.kernel", "d m -> m d"),
                    Row("merger.mlp.2.bias", "merger_fc2.bias", "d -> d"),
                ),
            ),
            Part(
                "visual.blocks.{layer}.",
                "vision.layers.",
                sizes,
                (
                    Row("norm1.weight", "attention_norm.scale", "e -> e"),
                    Row("norm1.bias", "attention_norm.bias", "e -> e"),
                    Row("attn.qkv.weight", tuple(f"{x}.kernel" for x in QKV), "(three n h) e -> three e n h"),
                    Row("attn.qkv.bias", tuple(f"{x}.bias" for x in QKV), "(three n h) -> three n h"),
                    Row("attn.proj.weight", "o_proj.kernel", "e (n h) -> n h e"),
                    Row("attn.proj.bias", "o_proj.bias", "e -> e"),
                    Row("norm2.weight", "mlp_norm.scale", "e -> e"),
                    Row("norm2.bias", "mlp_norm.bias", "e -> e"),
                    Row("mlp.fc1.weight", "fc1.kernel", "f e -> e f"),
                    Row("mlp.fc1.bias", "fc1.bias", "f -> f"),
                    Row("mlp.fc2.weight", "fc2.kernel", "e f -> f e"),
                    Row("mlp.fc2.bias", "fc2.bias", "e -> e"),
                ),
                vision.depth,
            ),
        ),
        renames=RENAMES,
        ignored=(Ignored(r"(model|visual)\..*\.?inv_freq", "rotary frequencies follow from config.json"),),
        copies={HEAD: EMBEDDING} if config.decoder.tied_head else None,
    )
