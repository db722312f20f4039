"""Published names of Qwen2-VL: `model.*`, `visual.*` and `lm_head`; newer versions of transformers may write others."""

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.table import EMBEDDING, HEAD, QKV, Ignored, Part, Table, decoder_parts, linear, norm, pattern_sizes

RENAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))


def table(config: Qwen2VLConfig) -> Table:
    """The mapping for a model of these sizes."""
    vision = config.vision
    sizes, side = pattern_sizes(vision.sizes), vision.patch_size
    patch = {"channel": vision.channels, "time": vision.temporal_patch, "row": side, "col": side}
    embed = "e channel time row col -> (channel time row col) e"
    return Table(
        parts=(
            *decoder_parts(config.decoder),
            Part(
                "visual.",
                "vision.",
                sizes | patch,
                (
                    *linear("patch_embed.proj", "patch_embed", embed, bias=False),
                    *norm("merger.ln_q", "merger_norm", "e"),
                    *linear("merger.mlp.0", "merger_fc1", "m g -> g m"),
                    *linear("merger.mlp.2", "merger_fc2", "d m -> m d"),
                ),
            ),
            Part(
                "visual.blocks.{layer}.",
                "vision.layers.",
                sizes,
                (
                    *norm("norm1", "attention_norm", "e"),
                    *linear("attn.qkv", QKV, "(three n h) e -> three e n h"),
                    *linear("attn.proj", "o_proj", "e (n h) -> n h e"),
                    *norm("norm2", "mlp_norm", "e"),
                    *linear("mlp.fc1", "fc1", "f e -> e f"),
                    *linear("mlp.fc2", "fc2", "e f -> f e"),
                ),
                vision.depth,
            ),
        ),
        renames=RENAMES,
        ignored=(Ignored(r"(model|visual)\..*\.?inv_freq", "rotary frequencies follow from config.json"),),
        copies={HEAD: EMBEDDING} if config.decoder.tied_head else None,
    )
