"""Convert published safetensors to our Orbax store and back, tensor by tensor and bit for bit.

A converted folder has `orbax` (see orbax_store), the small files of the source (config.json, tokenizer, processor, licence),
`carried.safetensors` if the source has tensors that the model does not use, and `conversion.json` (see conversion_record).
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.checkpoint import open_store, read_model_kind
from rlens_jax.checkpoints.conversion_record import FORMAT, RECORD, Record, checksum, read_record
from rlens_jax.checkpoints.leaves import by_layer, leaf_name, shapes_of
from rlens_jax.checkpoints.published import (
    CONFIG,
    INDEX,
    PICKLED,
    Published,
    all_finite,
    hf_json,
    index_json,
    opened,
    weight_files,
    with_dtype,
)
from rlens_jax.checkpoints.safetensors_file import DTYPES, Entry, Writer, dtype_name, entries, entry_of, read_bytes
from rlens_jax.console import say
from rlens_jax.errors import UserError
from rlens_jax.families.table import Problems, Table, Tensor
from rlens_jax.files import json_text, new_folder, read_json_object
from rlens_jax.mirrors import is_taken, size
from rlens_jax.resources import versions

CARRIED = "carried.safetensors"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *PICKLED, "*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
READ_BYTES = 1 << 22
Advance = Callable[[int], None]
"""Called with the number of bytes that were converted since the last call."""


@dataclass(frozen=True)
class Converted:
    """Result of a conversion."""

    folder: Path
    num_tensors: int
    num_bytes: int
    carried: Mapping[str, str]
    """Reasons per tensor that the model does not use."""


def source_bytes(source: Path) -> int:
    """Total size of the weight files of a source."""
    files = orbax_store.files(source) if orbax_store.is_store(source) else weight_files(source)
    try:
        return size(*files)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, though {INDEX} names it") from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def to_orbax(
    source: Path, target: Path, dtype: np.dtype | None, advance: Advance, *, name: str, revision: str | None = None
) -> Converted:
    """Convert published safetensors; `target` appears whole or not at all. One layer or tensor is in memory at a time.

    Args:
        source: a folder with published safetensors.
        target: must not exist yet.
        dtype: dtype to which all tensors that the model uses are rounded; None keeps each dtype.
        name, revision: of the source, for conversion.json.

    Raises:
        UserError: the source is not a complete checkpoint of finite numbers, or `target` cannot be written.
    """
    _check_folders(source, target)
    if orbax_store.is_store(source):
        raise UserError(f"{source}: is converted already; --to-hf converts it back to safetensors")
    files, small, problems = weight_files(source), _small_files(source), Problems(str(source))
    with opened(files, read_model_kind(source), problems) as published:
        published.table.check_covers(shapes_of(published.kind.abstract(np.float32)))
        record = _record(published, dtype, name, revision)
        total = sum(tensor["num_bytes"] for tensor in record["tensors"])
        _check_space(target, total)
        used = [*small, *(path for path in [source / INDEX] if path.exists()), *files]
        with new_folder(target) as unfinished, _hashes(used) as hashes:
            writer = orbax_store.Writer(unfinished)
            for group in _groups(published.table):
                leaves = _read_group(group, published, dtype, problems)
                record["leaves"] |= {leaf: checksum(array) for leaf, array in leaves.items()}
                if not problems.lines:
                    writer.add(leaves)
                advance(sum(array.nbytes for array in leaves.values()))
            problems.raise_any()
            writer.finish()
            _write_carried(unfinished, published)
            _copy_small(small, unfinished, dtype)
            record["files"] = hashes()
            (unfinished / RECORD).write_text(json_text(record), encoding="utf-8")
    carried = {item["name"]: item["reason"] for item in record["carried"]}
    return Converted(target, len(record["tensors"]), total, carried)


def to_safetensors(source: Path, target: Path, advance: Advance) -> Converted:
    """Convert a folder of `to_orbax` back, with the names, files, shapes, dtypes and bits of its source.

    Raises:
        UserError: `source` is not a converted folder or is damaged, or `target` exists or cannot be written.
    """
    _check_folders(source, target)
    if not orbax_store.is_store(source):
        raise UserError(f"{source}: is not a converted folder (it has no {orbax_store.STORE!r})")
    kind, reader = open_store(source)
    table, record, problems = kind.table(), read_record(source), Problems(str(source))
    if record.leaves is None:
        say(f"{source}: was converted without checksums, so damage cannot be noticed")
    reader.check_shapes(_leaf_shapes(table), problems)
    problems.raise_any()
    spellings = _spellings(record, table)
    carried = _carried(source, record)
    total = sum(entry.num_bytes for _, entry in record.tensors)
    _check_space(target, total)
    with new_folder(target) as unfinished:
        files: dict[str, list[Entry]] = {}
        for file, entry in record.tensors:
            files.setdefault(file, []).append(entry)
        with ExitStack() as stack:
            writers = {file: stack.enter_context(Writer(unfinished / file, listed)) for file, listed in files.items()}
            for group in _groups(table):
                leaves = reader.read(leaf_name(place) for tensor in group for place in tensor.places)
                record.check(leaves, problems)
                problems.raise_any()
                for tensor in group:
                    array = np.ascontiguousarray(tensor.to_published([leaves[leaf_name(place)] for place in tensor.places]))
                    for file, entry in spellings[tensor.name]:
                        _check_same(record, entry, array)
                        writers[file].write(entry.name, array)
                    advance(array.nbytes)
            for file, name in carried:
                writers[file].write(name, read_bytes(source / CARRIED, name))
        if len(files) > 1:
            index = index_json(total, {entry.name: file for file, entry in record.tensors})
            (unfinished / INDEX).write_text(index, encoding="utf-8")
        _copy_small([path for path in _small_files(source) if path.name != RECORD], unfinished, None)
    return Converted(target, len(record.tensors), total, record.carried)


def _leaf_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves of a store, by name."""
    return {
        leaf_name(place): shape
        for tensor in table.tensors.values()
        for place, shape in zip(tensor.places, tensor.place_shapes, strict=True)
    }


def _spellings(record: Record, table: Table) -> dict[str, list[tuple[str, Entry]]]:
    """Files and entries of each tensor in the source, copies included, by its name in the table."""
    spellings: dict[str, list[tuple[str, Entry]]] = {name: [] for name in table.tensors}
    for file, entry in record.tensors:
        if entry.name in record.carried:
            continue
        published = table.published_name(entry.name)
        original = (table.copies or {}).get(published, published)
        if original not in spellings:
            raise UserError(f"{record.path}: the tensor {entry.name} is not one of this model")
        spellings[original].append((file, entry))
    lacking = [name for name, found in spellings.items() if not found]
    if lacking:
        raise UserError(f"{record.path}: tensors: {lacking[0]} is missing")
    return spellings


def _check_same(record: Record, entry: Entry, array: np.ndarray) -> None:
    if DTYPES.get(entry.dtype) != array.dtype or entry_of(entry.name, entry.dtype, array.shape) != entry:
        stored = f"the store has {array.dtype} {list(array.shape)}"
        raise UserError(
            f"{record.path}: {entry.name} is {entry.dtype} {list(entry.shape)} of {entry.num_bytes} bytes, but {stored}"
        )


def _carried(source: Path, record: Record) -> list[tuple[str, str]]:
    """Files and names of the tensors that the model does not use, all of which the carried file has as they were."""
    listed = [(file, entry) for file, entry in record.tensors if entry.name in record.carried]
    stored = {entry.name: entry for entry in entries(source / CARRIED)} if listed else {}
    for _, entry in listed:
        if stored.get(entry.name) != entry:
            raise UserError(f"{source / CARRIED}: {entry.name} is missing, or is not as {RECORD} has it")
    return [(file, entry.name) for file, entry in listed]


def _check_folders(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the source itself; name a new folder")
    if is_taken(target):
        raise UserError(f"{target}: exists already; name a new folder or remove it")


def _check_space(target: Path, num_bytes: int) -> None:
    """Raise UserError if the disk of `target` has too little free space."""
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(f"{target}: needs {num_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free")


def _groups(table: Table) -> Iterator[list[Tensor]]:
    """Tensors that are converted together."""
    return by_layer(table.tensors.values(), lambda tensor: leaf_name(tensor.places[0]), lambda tensor: 4 * prod(tensor.shape))


def _read_group(group: list[Tensor], published: Published, dtype: np.dtype | None, problems: Problems) -> dict[str, np.ndarray]:
    leaves = {}
    for tensor in group:
        array, item = published.read(tensor.name), published.matched[tensor.name]
        if not all_finite(array):
            problems.add(item.file, item.name, "holds NaN or infinite values")
        elif dtype is not None and array.dtype != dtype:
            with np.errstate(over="ignore"):
                array = array.astype(dtype)
            if not all_finite(array):
                problems.add(item.file, item.name, f"holds values too large for {dtype}")
        for place, part in zip(tensor.places, tensor.to_ours(array), strict=True):
            leaves[leaf_name(place)] = np.ascontiguousarray(part)
    return leaves


def _write_carried(folder: Path, published: Published) -> None:
    listed = [(path, entry) for path, entry in published.entries if entry.name in published.ignored]
    if listed:
        with Writer(folder / CARRIED, [entry for _, entry in listed]) as writer:
            for path, entry in listed:
                writer.write(entry.name, read_bytes(path, entry.name))


def _small_files(folder: Path) -> list[Path]:
    """All files at the top of the folder that are not weights; these are copied."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in WEIGHTS)
    )


def _copy_small(files: list[Path], folder: Path, dtype: np.dtype | None) -> None:
    for path in files:
        if path.name == CONFIG and dtype is not None:
            (folder / CONFIG).write_text(hf_json(with_dtype(read_json_object(path), str(dtype))), encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)


def _record(published: Published, dtype: np.dtype | None, name: str, revision: str | None) -> dict[str, Any]:
    tensors = []
    for path, entry in published.entries:
        if dtype is not None and entry.name not in published.ignored:
            entry = entry_of(entry.name, dtype_name(dtype), entry.shape)
        size = {"shape": list(entry.shape), "dtype": entry.dtype, "num_bytes": entry.num_bytes}
        tensors.append({"name": entry.name, "file": path.name, **size})
    return {
        "format": FORMAT,
        "source": {"name": name, "revision": revision},
        "model_type": published.kind.model_type,
        "dtype": None if dtype is None else str(dtype),
        "versions": versions(),
        "files": [],
        "tensors": tensors,
        "carried": [{"name": name, "reason": ignored.reason} for name, ignored in published.ignored.items()],
        "leaves": {},
    }


@contextmanager
def _hashes(files: list[Path]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Hash files in a thread; the yielded function waits for the results."""
    stopped = Event()

    def digest(path: Path) -> dict[str, Any]:
        total, size = sha256(), 0
        with path.open("rb") as file:
            while not stopped.is_set() and (part := file.read(READ_BYTES)):
                total.update(part)
                size += len(part)
        return {"name": path.name, "bytes": size, "sha256": total.hexdigest()}

    with ThreadPoolExecutor(1) as pool:
        running = [pool.submit(digest, path) for path in files]
        try:
            yield lambda: [result.result() for result in running]
        finally:
            stopped.set()
