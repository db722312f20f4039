"""Published names of Qwen3-VL: `model.language_model.*`, `model.visual.*` and `lm_head`, as in the memory of transformers."""

import re
from dataclasses import replace

from rlens_jax.families.qwen2_vl.weights import merger, patch_embed, tower_table
from rlens_jax.families.qwen3_vl.model import Qwen3VLConfig
from rlens_jax.families.table import EMBEDDING, HEAD, Part, Row, Table, linear, norm, pattern_sizes


def table(config: Qwen3VLConfig) -> Table:
    """The mapping for a model of these sizes."""
    vision = config.vision
    outer = (
        *patch_embed(bias=True),
        Row("pos_embed.weight", "position_embedding", "p e -> p e"),
        *norm("merger.norm", "merger.norm", "e"),
        *merger("merger.linear_fc1", "merger.linear_fc2", "merger."),
    )
    block = (
        *norm("norm1", "attention_norm", "e"),
        *norm("norm2", "mlp_norm", "e"),
        *linear("mlp.linear_fc1", "fc1", "f e -> e f"),
        *linear("mlp.linear_fc2", "fc2", "e f -> f e"),
    )
    sizes, rows = pattern_sizes(vision.sizes), (*norm("norm", "norm", "g"), *merger("linear_fc1", "linear_fc2", ""))
    features = [
        Part(f"visual.deepstack_merger_list.{number}.", f"vision.deepstack.{number}.", sizes, rows)
        for number in range(len(vision.deepstack))
    ]
    plain = tower_table(config, outer, block, *features)
    return replace(
        plain,
        parts=tuple(replace(part, source=_prefixed(part.source), rows=_prefixed_rows(part.rows)) for part in plain.parts),
        renames=(),
        copies={HEAD: _prefixed(EMBEDDING)} if plain.copies else None,
    )


def _prefixed(name: str) -> str:
    """A name, or its beginning, of the rows of Qwen2-VL in the spelling of Qwen3-VL."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


def _prefixed_rows(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(replace(row, source=_prefixed(row.source)) for row in rows)
