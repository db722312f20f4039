"""Writing a model as Hugging Face publishes it: safetensors with the published names, and config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from rlens_jax.checkpoints.atomic import new_folder
from rlens_jax.checkpoints.leaves import arrays_of, read_place, shapes_of
from rlens_jax.families.registry import read_kind
from rlens_jax.families.tables import table_of

SHARD_BYTES = 5_000_000_000


def save_hf(
    folder: str | Path, model: nnx.Module, config_json: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `folder` whole or not at all, in the dtype of the model's parameters.

    Args:
        folder: must not exist yet.
        model: float32 or bfloat16 parameters.
        config_json: the fields of its config.json; their dtype is set to the model's.
        shard_bytes: a file is closed before it would grow larger; one tensor is never cut.

    Raises:
        UserError: the folder exists, or `config_json` describes no supported model.
        ValueError: the model does not have the sizes that `config_json` says.
    """
    table = table_of(read_kind(config_json, "config.json"))
    table.check_covers(shapes_of(model))
    arrays = arrays_of(model)
    dtype = next(iter(arrays.values())).dtype
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in table.tensors.items():
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    with new_folder(Path(folder)) as partial:
        config = partial / "config.json"
        config.write_text(json.dumps(with_dtype(config_json, str(dtype)), indent=2) + "\n", encoding="utf-8")
        weight_map = {}
        for number, names in enumerate(shards, 1):
            of = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
            file = f"model{of}.safetensors"
            tensors = {}
            for name in names:
                places = table.tensors[name].places
                published = table.tensors[name].to_published([read_place(arrays, place) for place in places])
                tensors[name] = np.ascontiguousarray(published)
            save_file(tensors, partial / file, metadata={"format": "pt"})
            (partial / file).chmod(config.stat().st_mode)  # safetensors makes it readable for its owner only
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(int(np.prod(tensor.shape)) for tensor in table.tensors.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The fields, and those of nested configs, with every mention of a dtype replaced."""
    nested = {name: with_dtype(value, dtype) for name, value in fields.items() if isinstance(value, Mapping)}
    return {**fields, **nested, **{name: dtype for name in ("dtype", "torch_dtype") if name in fields}}
