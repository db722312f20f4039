"""Hugging Face's model inputs as ours: what all families share, and which file reads which family's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlens_jax.errors import UserError, suggest
from rlens_jax.families.internvl import reference as internvl
from rlens_jax.families.llava_onevision import reference as llava_onevision
from rlens_jax.families.minicpm_v import reference as minicpm_v
from rlens_jax.families.qwen2_vl import reference as qwen2_vl
from rlens_jax.families.reference_rows import TEXT_NAMES, FamilyInputs, Row

INPUTS: Mapping[str, FamilyInputs] = {
    "internvl": internvl.HF_INPUTS,
    "internvl_chat": internvl.NATIVE_INPUTS,
    "llava_onevision": llava_onevision.INPUTS,
    "minicpmv": minicpm_v.INPUTS,
    "qwen2_vl": qwen2_vl.INPUTS,
}
"""By `model_type`."""


def input_names(model_type: str) -> tuple[str, ...]:
    """What a family's inputs are called; UserError for a family whose bundles cannot be read."""
    if model_type not in INPUTS:
        raise UserError(
            f"bundles of the family {model_type!r} are not supported{suggest(model_type, INPUTS)}; "
            f"supported are: {', '.join(sorted(INPUTS))}"
        )
    return (*TEXT_NAMES, *INPUTS[model_type].names)


def read_rows(where: str, tensors: Mapping[str, np.ndarray], model_type: str, config: Any) -> list[Row]:
    """All samples of a case.

    Args:
        where: names the case in complaints.
        tensors: the inputs by name.
        model_type: the model's family.
        config: the family's own, of our model.

    Raises:
        UserError: the inputs do not fit each other or the model.
    """
    if "input_ids" not in tensors:
        raise UserError(f"{where}: holds no input_ids")
    ids = tensors["input_ids"]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind != "i":
        raise UserError(f"{where}: input_ids has shape {list(ids.shape)}, expected whole numbers [B, T]")
    mask = tensors.get("attention_mask", np.ones_like(ids))
    if mask.shape != ids.shape:
        raise UserError(
            f"{where}: attention_mask has shape {list(mask.shape)}, expected {list(ids.shape)} as input_ids"
        )
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(ids.shape[1])[None] < lengths[:, None]) or not lengths.all():
        raise UserError(f"{where}: attention_mask is not 1 ... 1 0 ... 0 in each row; bundles are right-padded")
    vocabulary = config.decoder.vocabulary
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(f"{where}: input_ids has tokens outside the model's vocabulary of {vocabulary}")
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return INPUTS[model_type].read(where, rows, tensors, config)
