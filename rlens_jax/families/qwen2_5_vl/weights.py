"""Published names of Qwen2.5-VL: those of Qwen2-VL, with norms without bias and a gated MLP in the tower."""

from rlens_jax.families.qwen2_5_vl.model import Qwen25VLConfig
from rlens_jax.families.qwen2_vl.weights import merger, patch_embed, tower_table
from rlens_jax.families.table import Table, linear, norm


def table(config: Qwen25VLConfig) -> Table:
    """The mapping for a model of these sizes."""
    outer = (
        *patch_embed(bias=False),
        *norm("merger.ln_q", "merger_norm", "e", bias=False),
        *merger("merger.mlp.0", "merger.mlp.2"),
    )
    block = (
        *norm("norm1", "attention_norm", "e", bias=False),
        *norm("norm2", "mlp_norm", "e", bias=False),
        *linear("mlp.gate_proj", "gate", "f e -> e f"),
        *linear("mlp.up_proj", "fc1", "f e -> e f"),
        *linear("mlp.down_proj", "fc2", "e f -> f e"),
    )
    return tower_table(config, outer, block)
