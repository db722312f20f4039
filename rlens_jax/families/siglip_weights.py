"""Published names of a SigLIP tower, which families share; each has its own prefix."""

from rlens_jax.families.siglip import SiglipConfig
from rlens_jax.families.table import Part, Row


def siglip_parts(config: SiglipConfig, source: str, target: str) -> tuple[Part, ...]:
    """Rows of embeddings and layers.

    Args:
        config: sizes of the tower.
        source: prefix of the published names, such as "vision_tower.vision_model.".
        target: dotted path of our `SiglipTower`, with a dot at its end.
    """
    sizes = {letter.lower(): size for letter, size in config.sizes.items()}
    patch = {"channel": config.channels, "row": config.patch_size, "col": config.patch_size}
    return (
        Part(
            f"{source}embeddings.",
            target,
            {**sizes, **patch},
            (
                Row("patch_embedding.weight", "patch_embed.kernel", "e channel row col -> (channel row col) e"),
                Row("patch_embedding.bias", "patch_embed.bias", "e -> e"),
                Row("position_embedding.weight", "position_embedding", "p e -> p e"),
            ),
        ),
        Part(
            f"{source}encoder.layers.{{layer}}.",
            f"{target}layers.",
            sizes,
            (
                Row("layer_norm1.weight", "attention_norm.scale", "e -> e"),
                Row("layer_norm1.bias", "attention_norm.bias", "e -> e"),
                Row("self_attn.q_proj.weight", "q_proj.kernel", "(n h) e -> e n h"),
                Row("self_attn.q_proj.bias", "q_proj.bias", "(n h) -> n h"),
                Row("self_attn.k_proj.weight", "k_proj.kernel", "(n h) e -> e n h"),
                Row("self_attn.k_proj.bias", "k_proj.bias", "(n h) -> n h"),
                Row("self_attn.v_proj.weight", "v_proj.kernel", "(n h) e -> e n h"),
                Row("self_attn.v_proj.bias", "v_proj.bias", "(n h) -> n h"),
                Row("self_attn.out_proj.weight", "o_proj.kernel", "e (n h) -> n h e"),
                Row("self_attn.out_proj.bias", "o_proj.bias", "e -> e"),
                Row("layer_norm2.weight", "mlp_norm.scale", "e -> e"),
                Row("layer_norm2.bias", "mlp_norm.bias", "e -> e"),
                Row("mlp.fc1.weight", "fc1.kernel", "f e -> e f"),
                Row("mlp.fc1.bias", "fc1.bias", "f -> f"),
                Row("mlp.fc2.weight", "fc2.kernel", "e f -> f e"),
                Row("mlp.fc2.bias", "fc2.bias", "e -> e"),
            ),
            config.depth,
        ),
    )
