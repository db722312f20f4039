"""Which mapping table belongs to which model family."""

from collections.abc import Callable, Mapping
from typing import Any

from rlens_jax.families.internvl import weights as internvl
from rlens_jax.families.llava_onevision import weights as llava_onevision
from rlens_jax.families.minicpm_v import weights as minicpm_v
from rlens_jax.families.qwen2_vl import weights as qwen2_vl
from rlens_jax.families.registry import ModelKind
from rlens_jax.families.table import Table

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
