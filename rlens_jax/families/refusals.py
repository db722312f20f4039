"""Kinds of checkpoints that no family supports, recognised by config.json or by the names of tensors, and what to use instead."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlens_jax.errors import UserError
from rlens_jax.files import quoted

_SECTIONS = ("text_config", "llm_config", "vision_config")
"""Objects in config.json that may say of themselves what the whole file does not."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MIXTURE = re.compile(r"(^|_)(moe|mixtral|gpt_oss)(_|$)")
"""In a `model_type`."""
_QUANTISED = re.compile(
    r".*[._](qweight|qzeros|scales|g_idx|weight_scale(_inv)?|input_scale|weight_packed|SCB|absmax|quant_map|quant_state)(\..*)?"
)
"""Names of tensors of awq, gptq, fp8, compressed-tensors and bitsandbytes."""
_DENSE = "use a dense model of the family, such as Qwen3-VL-8B-Instruct or InternVL3_5-8B"
_UNQUANTISED = "use the model that it was made from, with weights in bfloat16, float16 or float32"


def refuse_unsupported(fields: Mapping[str, Any], where: str) -> None:
    """Raise UserError, beginning with `where`, if a config.json is of quantised weights or of a mixture of experts."""
    for place, section in _sections(fields, where):
        if (found := section.get("quantization_config")) is not None:
            raise UserError(f"{place}: the weights are quantised ({_method(found)}), which is not supported; {_UNQUANTISED}")
        experts = any(isinstance(section.get(name), int) and section[name] > 1 for name in _EXPERTS)
        kind = str(section.get("model_type"))
        if experts or _MIXTURE.search(kind):
            raise UserError(f"{place}: {quoted(kind)} is a mixture of experts, which is not supported; {_DENSE}")


def refuse_quantised(file: str, tensor: str, dtype: str) -> None:
    """Raise UserError if the name or the dtype of a tensor shows that the weights of a checkpoint are quantised."""
    if dtype.startswith("F8") or _QUANTISED.fullmatch(tensor):
        raise UserError(f"{file}: {tensor} ({dtype}): the weights are quantised, which is not supported; {_UNQUANTISED}")


def _sections(fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The whole, and the nested objects, each with its name in messages."""
    yield where, fields
    for name in _SECTIONS:
        if isinstance(section := fields.get(name), Mapping):
            yield f"{where}: {name}", section


def _method(found: Any) -> str:
    """The name of the method in a `quantization_config`."""
    fields = found if isinstance(found, Mapping) else {"quant_method": found}
    flags = [name for name in ("load_in_4bit", "load_in_8bit") if fields.get(name)]
    return quoted(fields.get("quant_method", (flags or ["by an unknown method"])[0]))
