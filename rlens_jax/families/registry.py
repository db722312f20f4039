"""The supported model families: which config.json belongs to which reader and module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rlens_jax.errors import UserError, suggest
from rlens_jax.families.hf_config import ConfigReader
from rlens_jax.families.internvl import model as internvl
from rlens_jax.families.llava_onevision import model as llava_onevision
from rlens_jax.families.minicpm_v import model as minicpm_v
from rlens_jax.families.qwen2_vl import model as qwen2_vl

ImageArrays = Sequence[tuple[tuple[int, ...], DTypeLike]]
"""Shape and dtype of each array that a tower takes of one image."""


@dataclass(frozen=True)
class Family:
    """What a model file offers."""

    read_config: Callable[[ConfigReader], Any]
    """Sizes and constants from config.json; UserError where it asks for what is not supported."""
    module: Callable[..., nnx.Module]
    """`module(config, *, dtype, rngs)`: the whole model, randomly initialised."""
    preparer: Callable[..., Any]
    """`preparer(folder, config, patch_slots)`: a `rlens_jax.engine.inputs.Preparer` by the checkpoint's own files."""
    image_arrays: Callable[[Any, int], ImageArrays]
    """`image_arrays(config, patches)`: what the preparer makes of an image, padded to a bucket of so many patches."""


FAMILIES: Mapping[str, Family] = {
    "internvl": Family(internvl.read_hf_config, internvl.InternVL, internvl.Preparer, internvl.image_arrays),
    "internvl_chat": Family(internvl.read_native_config, internvl.InternVL, internvl.Preparer, internvl.image_arrays),
    "llava_onevision": Family(
        llava_onevision.read_config,
        llava_onevision.LlavaOnevision,
        llava_onevision.Preparer,
        llava_onevision.image_arrays,
    ),
    "minicpmv": Family(minicpm_v.read_config, minicpm_v.MiniCPMV, minicpm_v.Preparer, minicpm_v.image_arrays),
    "qwen2_vl": Family(qwen2_vl.read_config, qwen2_vl.Qwen2VL, qwen2_vl.Preparer, qwen2_vl.image_arrays),
}
"""By `model_type`, as config.json says it."""


@dataclass(frozen=True)
class ModelKind:
    """Which model a config.json describes."""

    model_type: str
    config: Any
    """The family's own frozen dataclass, such as `Qwen2VLConfig`."""
    fields: Mapping[str, Any]
    """The whole config.json, to be kept beside converted weights."""

    def abstract(self, dtype: DTypeLike) -> nnx.Module:
        """The module with shapes and dtypes in place of arrays; nothing is allocated."""
        family = FAMILIES[self.model_type]
        return nnx.eval_shape(lambda: family.module(self.config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))

    def image_arrays(self, patches: int) -> ImageArrays:
        """Shapes and dtypes of one prepared image in a bucket of so many patches.

        Raises:
            UserError: the bucket is too small for this model.
        """
        return FAMILIES[self.model_type].image_arrays(self.config, patches)


def read_kind(fields: Mapping[str, Any], where: str) -> ModelKind:
    """The model that the fields of a config.json describe; `where` names their source in complaints.

    Raises:
        UserError: the family is not supported, or a field is missing or asks for what is not supported.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported{suggest(model_type, FAMILIES)}; "
            f"supported are: {supported}"
        )
    return ModelKind(model_type, FAMILIES[model_type].read_config(ConfigReader(fields, where)), fields)
