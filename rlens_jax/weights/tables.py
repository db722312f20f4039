"""Which mapping table belongs to which model family."""

from collections.abc import Callable, Mapping
from typing import Any

from rlens_jax.models import ModelKind
from rlens_jax.weights import internvl, llava_onevision, minicpm_v, qwen2_vl
from rlens_jax.weights.table import Table

TABLES: Mapping[str, Callable[[Any], Table]] = {
    "internvl": internvl.table,
    "internvl_chat": internvl.table,
    "llava_onevision": llava_onevision.table,
    "minicpmv": minicpm_v.table,
    "qwen2_vl": qwen2_vl.table,
}
"""By `model_type`; the argument is the family's config."""


def table_of(kind: ModelKind) -> Table:
    """The mapping of a model's published tensors."""
    return TABLES[kind.model_type](kind.config)
