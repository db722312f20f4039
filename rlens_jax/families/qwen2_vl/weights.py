"""Published names of Qwen2-VL, and what later families share of them: `model.*`, `visual.*` and `lm_head`.

Newer versions of transformers may write others.
"""

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.table import EMBEDDING, HEAD, QKV, Ignored, Part, Row, Table, decoder_parts, linear, norm, pattern_sizes

RENAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))


def table(config: Qwen2VLConfig) -> Table:
    """The mapping for a model of these sizes."""
    outer = (*patch_embed(bias=False), *norm("merger.ln_q", "merger_norm", "e"), *merger("merger.mlp.0", "merger.mlp.2"))
    block = (
        *norm("norm1", "attention_norm", "e"),
        *norm("norm2", "mlp_norm", "e"),
        *linear("mlp.fc1", "fc1", "f e -> e f"),
        *linear("mlp.fc2", "fc2", "e f -> f e"),
    )
    return tower_table(config, outer, block)


def patch_embed(*, bias: bool) -> tuple[Row, ...]:
    """Rows of the patch embedding, a convolution."""
    return linear("patch_embed.proj", "patch_embed", "e channel time row col -> (channel time row col) e", bias=bias)


def merger(first: str, second: str, target: str = "merger_") -> tuple[Row, ...]:
    """Rows of a merger's two linear maps, which have these names; the names of ours begin with `target`."""
    return (*linear(first, f"{target}fc1", "m g -> g m"), *linear(second, f"{target}fc2", "d m -> m d"))


def tower_table(config: Qwen2VLConfig, outer: tuple[Row, ...], block: tuple[Row, ...], *more: Part) -> Table:
    """The mapping of a Qwen-VL model.

    Args:
        config: its sizes.
        outer: rows of the tower outside its blocks.
        block: rows of a block besides attention's linear maps.
        more: further parts.
    """
    vision = config.vision
    sizes, side = pattern_sizes(vision.sizes), vision.patch_size
    patch = {"channel": vision.channels, "time": vision.temporal_patch, "row": side, "col": side}
    attention = (*linear("attn.qkv", QKV, "(three n h) e -> three e n h"), *linear("attn.proj", "o_proj", "e (n h) -> n h e"))
    return Table(
        parts=(
            *decoder_parts(config.decoder),
            Part("visual.", "vision.", sizes | patch, outer),
            Part("visual.blocks.{layer}.", "vision.layers.", sizes, (*attention, *block), vision.depth),
            *more,
        ),
        renames=RENAMES,
        ignored=(Ignored(r"(model|visual)\..*\.?inv_freq", "rotary frequencies follow from config.json"),),
        copies={HEAD: EMBEDDING} if config.decoder.tied_head else None,
    )
