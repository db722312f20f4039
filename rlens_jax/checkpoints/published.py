"""Model folders as Hugging Face publishes them: safetensors with the published names, and config.json."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from rlens_jax.checkpoints.containment import inside
from rlens_jax.checkpoints.leaves import arrays_of, read_place, shapes_of
from rlens_jax.checkpoints.safetensors_file import DTYPES, Entry, entries, open_safetensors
from rlens_jax.console import say
from rlens_jax.errors import UserError
from rlens_jax.families.refusals import refuse_quantised
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.families.table import Found, Ignored, Problems, Table, match
from rlens_jax.files import new_folder, read_json_object

CONFIG = "config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHUNK = 1 << 22
"""Numbers checked per step."""
SHARD_BYTES = 5_000_000_000


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of the index, or model.safetensors, or all."""
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: weight_map must map tensor names to file names")
        paths = {inside(folder, name, folder / INDEX) for name in weight_map.values()}
        if folder / SINGLE not in paths and (folder / SINGLE).exists():
            raise UserError(f"{folder}: has both {INDEX} and {SINGLE}; remove the one that does not belong to the model")
        return sorted(paths)
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not files and pickled:
        raise UserError(
            f"{folder}: all weights are pickled ({pickled[0]}); pickles can run code when they are opened and are "
            "never read here, so save the model again as safetensors"
        )
    if not files:
        raise UserError(f"{folder}: has no weights (*.safetensors)")
    return files


@dataclass(frozen=True)
class Published:
    """The tensors of a checkpoint: those of the model, and known ones that the model does not need."""

    kind: ModelKind
    """Has a head of its own if the files have one that differs from the embedding."""
    table: Table
    matched: dict[str, Found]
    """By name in the table; includes copies, such as a tied head."""
    entries: list[tuple[Path, Entry]]
    """All tensors of all files, in the order and spelling of the files."""
    ignored: dict[str, Ignored]
    """By name in the file."""
    _read: Callable[[Found], np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """Read a tensor, by its name in the table."""
        return self._read(self.matched[name])


@contextmanager
def opened(files: Sequence[Path], kind: ModelKind, problems: Problems) -> Iterator[Published]:
    """Open safetensors files and match their tensors with the table of the family.

    A head in the files that differs from the embedding is used, though config.json ties the two, and a line says so.

    Raises:
        UserError: a file is incomplete, the weights are quantised, or the tensors are not those of the table; one message lists
            all problems.
    """
    table = kind.table()
    with ExitStack() as stack:
        handles = {path.name: stack.enter_context(open_safetensors(path, INDEX)) for path in files}
        listed = [(path, entry) for path in files for entry in entries(path)]
        ignored = {}
        for path, entry in listed:
            refuse_quantised(path.name, entry.name, entry.dtype)
            reason = _ignored(table, entry.name)
            if entry.name in ignored:
                problems.add(path.name, entry.name, "doubled, it is also in another file")
            elif reason is not None:
                ignored[entry.name] = reason
            elif entry.dtype not in DTYPES:
                problems.add(path.name, entry.name, f"has dtype {entry.dtype}, supported are {', '.join(DTYPES)}")
        tensors = [Found(entry.name, path.name, entry.shape) for path, entry in listed]
        matched = match(table, tensors, problems)
        problems.raise_any()

        def read(item: Found) -> np.ndarray:
            return handles[item.file].get_tensor(item.name)

        for name, original in (table.copies or {}).items():
            if name in matched and not _same_bits(read(matched[name]), read(matched[original])):
                own, other = matched[name], matched[original].name
                say(f"{own.file}: {own.name} differs from {other}, so it is used, though config.json has tie_word_embeddings")
                kind = kind.with_own_head()
                table = kind.table()
        yield Published(kind, table, matched, listed, ignored, read)


def all_finite(array: np.ndarray) -> bool:
    """Whether a contiguous float array has no NaN and no infinity; compares exponent bits, which is fast."""
    bits = array.reshape(-1).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    without_sign = np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)
    return all((bits[start : start + CHUNK] & without_sign).max() < infinity for start in range(0, bits.size, CHUNK))


def _ignored(table: Table, name: str) -> Ignored | None:
    spelled = table.published_name(name)
    return next((ignored for ignored in table.ignored if re.fullmatch(ignored.source, spelled)), None)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def save_hf(folder: str | Path, model: nnx.Module, config_json: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model in the dtype of its parameters; `folder` appears whole or not at all.

    Args:
        folder: must not exist yet.
        model: float32 or bfloat16 parameters.
        config_json: the fields of its config.json; their dtype is set to the dtype of the model.
        shard_bytes: a file is closed before it would grow larger; a single tensor is never split.

    Raises:
        UserError: the folder exists, or `config_json` describes no supported model.
        ValueError: the sizes of the model differ from those in `config_json`.
    """
    table = read_kind(config_json, CONFIG).table()
    table.check_covers(shapes_of(model))
    arrays = arrays_of(model)
    dtype = next(iter(arrays.values())).dtype
    sizes = {name: prod(tensor.shape) * dtype.itemsize for name, tensor in table.tensors.items()}
    files = _shards(sizes, shard_bytes)
    with new_folder(Path(folder)) as partial:
        config = partial / CONFIG
        config.write_text(hf_json(with_dtype(config_json, str(dtype))), encoding="utf-8")
        for file, names in files.items():
            tensors = {}
            for name in names:
                parts = [read_place(arrays, place) for place in table.tensors[name].places]
                tensors[name] = np.ascontiguousarray(table.tensors[name].to_published(parts))
            save_file(tensors, partial / file, metadata={"format": "pt"})
            (partial / file).chmod(config.stat().st_mode)  # save_file lets only the owner read it
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            (partial / INDEX).write_text(index_json(sum(sizes.values()), weight_map), encoding="utf-8")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order, by file name."""
    shards: dict[int, list[str]] = defaultdict(list)
    number = filled = 0
    for name, size in sizes.items():
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        shards[number].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number + 1:05}-of-{len(shards):05}.safetensors": names for number, names in shards.items()}


def with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The fields of a config.json and of its nested configs, with every dtype in them replaced."""
    nested = {name: with_dtype(value, dtype) for name, value in fields.items() if isinstance(value, Mapping)}
    return {**fields, **nested, **{name: dtype for name in ("dtype", "torch_dtype") if name in fields}}


def hf_json(fields: Mapping[str, Any]) -> str:
    """JSON as Hugging Face writes it."""
    return json.dumps(fields, indent=2) + "\n"


def index_json(num_bytes: int, weight_map: Mapping[str, str]) -> str:
    """The index of a checkpoint in several files: the file of each tensor."""
    return hf_json({"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
