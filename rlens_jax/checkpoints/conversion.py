"""Published safetensors to our Orbax folder and back, tensor by tensor and bit for bit.

A converted folder holds `orbax` (see orbax_store), the source's small files (config.json, tokenizer, processor, licence),
`carried.safetensors` when the source has tensors that the model does not use, and `conversion.json`:

    format      "rlens-conversion/1"
    source      name as given, without the folders above it; revision of the hub or null
    model_type  as in config.json
    dtype       null, or the dtype that all used tensors were rounded to
    versions    of the packages that took part
    files       of the source: name, bytes, sha256
    tensors     of the source, in its order and spelling: name, file, shape, dtype (as stored here)
    carried     tensors that the model does not use: name, reason
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.atomic import new_folder
from rlens_jax.checkpoints.checkpoint import CONFIG, read_model_kind
from rlens_jax.checkpoints.export import with_dtype
from rlens_jax.checkpoints.leaves import leaf_name, shapes_of, together
from rlens_jax.checkpoints.published import INDEX, PICKLED, Published, all_finite, opened, weight_files
from rlens_jax.checkpoints.safetensors_file import DTYPES, Entry, Writer, dtype_name, entry_of, read_bytes
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import read_json
from rlens_jax.families.registry import ModelKind
from rlens_jax.families.table import Problems, Table, Tensor
from rlens_jax.families.tables import table_of
from rlens_jax.versions import versions

FORMAT = "rlens-conversion/1"
RECORD, CARRIED = "conversion.json", "carried.safetensors"
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    *PICKLED,
    "*.bin.index.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)
READ_BYTES = 1 << 22

Advance = Callable[[int], None]
"""Called with the number of bytes that are done."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    folder: Path
    num_tensors: int
    num_bytes: int
    carried: Mapping[str, str]
    """Tensors that the model does not use, and why."""


def source_bytes(source: Path) -> int:
    """Size of a source's tensors: what a conversion's `advance` sums up to."""
    files = orbax_store.files(source) if orbax_store.is_store(source) else weight_files(source)
    try:
        return sum(path.stat().st_size for path in files)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, though {INDEX} names it") from None


def to_orbax(
    source: Path,
    target: Path,
    dtype: np.dtype | None,
    advance: Advance,
    *,
    name: str,
    revision: str | None = None,
) -> Converted:
    """Writes `target`, a converted folder, whole or not at all; holds a layer or a tensor at a time.

    Args:
        source: a folder with published safetensors.
        target: must not exist yet.
        dtype: rounds all tensors that the model uses; None leaves each as it is.
        advance: progress.
        name: of the source, for the record.
        revision: of the source on the hub, for the record.

    Raises:
        UserError: the source is not one complete checkpoint of finite numbers, or `target` cannot be written.
    """
    _check_folders(source, target)
    if orbax_store.is_store(source):
        raise UserError(f"{source}: is converted already; --to-hf turns it back into safetensors")
    kind, files, problems = read_model_kind(source), weight_files(source), Problems(str(source))
    table = table_of(kind)
    table.check_covers(shapes_of(kind.abstract(np.float32)))
    small = _small_files(source)
    with opened(files, table, problems) as published:
        published.check_copies(problems)
        problems.raise_any()
        record = _record(kind, published, dtype, name, revision)
        _check_space(target, sum(tensor["num_bytes"] for tensor in record["tensors"]))
        used = [*small, *(path for path in [source / INDEX] if path.exists()), *files]
        with new_folder(target) as unfinished, _hashes(used) as hashes:
            writer = orbax_store.Writer(unfinished)
            for group in _groups(table):
                leaves = _read_group(group, published, dtype, problems)
                if not problems.lines:
                    writer.add(leaves)
                advance(sum(array.nbytes for array in leaves.values()))
            problems.raise_any()
            writer.finish()
            _write_carried(unfinished, published)
            _copy_small(small, unfinished, dtype)
            record["files"] = hashes()
            _write_record(unfinished, record)
    total = sum(tensor["num_bytes"] for tensor in record["tensors"])
    carried = {item["name"]: item["reason"] for item in record["carried"]}
    return Converted(target, len(record["tensors"]), total, carried)


def to_safetensors(source: Path, target: Path, advance: Advance) -> Converted:
    """Turns a converted folder back: the source's names, files, shapes, dtypes and bits.

    Args:
        source: a folder that `to_orbax` wrote.
        target: must not exist yet.
        advance: progress.

    Raises:
        UserError: `source` is no converted folder or is damaged, or `target` cannot be written.
    """
    _check_folders(source, target)
    if not orbax_store.is_store(source):
        raise UserError(f"{source}: is no converted folder (it holds no {orbax_store.STORE!r})")
    kind, record = read_model_kind(source), _read_record(source)
    table, reader = table_of(kind), orbax_store.Reader(source)
    carried = {item["name"]: item["reason"] for item in record["carried"]}
    listed = [
        (item["file"], Entry(item["name"], item["dtype"], tuple(item["shape"]), item["num_bytes"]))
        for item in record["tensors"]
    ]
    total = sum(entry.num_bytes for _, entry in listed)
    spelled: dict[str, list[tuple[str, str]]] = {}
    for file, entry in listed:
        if entry.name not in carried:
            published = table.published_name(entry.name)
            original = (table.copies or {}).get(published, published)
            if original not in table.tensors:
                raise UserError(f"{source / RECORD}: the tensor {entry.name} is not one of this model")
            spelled.setdefault(original, []).append((file, entry.name))
    _check_space(target, total)
    with new_folder(target) as unfinished:
        with ExitStack() as stack:
            files = dict.fromkeys(file for file, _ in listed)
            writers = {
                file: stack.enter_context(Writer(unfinished / file, [e for name, e in listed if name == file]))
                for file in files
            }
            for group in _groups(table):
                leaves = reader.read(leaf_name(place) for tensor in group for place in tensor.places)
                for tensor in group:
                    array = tensor.to_published([leaves[leaf_name(place)] for place in tensor.places])
                    array = np.ascontiguousarray(array)
                    for file, name in spelled[tensor.name]:
                        writers[file].write(name, array)
                    advance(array.nbytes)
            for file, entry in listed:
                if entry.name in carried:
                    writers[file].write(entry.name, read_bytes(source / CARRIED, entry.name))
        if len(files) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {entry.name: file for file, entry in listed},
            }
            (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _copy_small([path for path in _small_files(source) if path.name != RECORD], unfinished, None)
    return Converted(target, len(listed), total, carried)


def _check_folders(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the source itself; name a new folder")
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder or remove it")


def _check_space(target: Path, num_bytes: int) -> None:
    """Refuses at once what the disk could not hold."""
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(f"{target}: needs {num_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free")


def _groups(table: Table) -> Iterator[list[Tensor]]:
    """Tensors that are held together: those of one layer of a stack, one without layers, or several small such groups."""

    def layer(tensor: Tensor) -> tuple[str, int]:
        place = tensor.places[0]
        return (tensor.name, -1) if place.layer is None else (place.path.partition(".layers.")[0], place.layer)

    groups = (list(group) for _, group in groupby(sorted(table.tensors.values(), key=layer), layer))
    return together(groups, lambda tensor: 4 * prod(tensor.shape))


def _read_group(
    group: list[Tensor], published: Published, dtype: np.dtype | None, problems: Problems
) -> dict[str, np.ndarray]:
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
    """What is copied: all files at the top that hold no weights."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in WEIGHTS)
    )


def _copy_small(files: list[Path], folder: Path, dtype: np.dtype | None) -> None:
    for path in files:
        if path.name == CONFIG and dtype is not None:
            fields = with_dtype(read_json(path), str(dtype))
            (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)


def _record(
    kind: ModelKind, published: Published, dtype: np.dtype | None, name: str, revision: str | None
) -> dict[str, Any]:
    tensors = []
    for path, entry in published.entries:
        if dtype is not None and entry.name not in published.ignored:
            entry = entry_of(entry.name, dtype_name(dtype), entry.shape)
        tensors.append(
            {
                "name": entry.name,
                "file": path.name,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "num_bytes": entry.num_bytes,
            }
        )
    return {
        "format": FORMAT,
        "source": {"name": name, "revision": revision},
        "model_type": kind.model_type,
        "dtype": None if dtype is None else str(dtype),
        "versions": versions(),
        "files": [],
        "tensors": tensors,
        "carried": [{"name": name, "reason": ignored.reason} for name, ignored in published.ignored.items()],
    }


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        raise UserError(f"{path}: no such file; only a folder that rlens_jax.convert wrote can be turned back")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: has the format {record.get('format')!r}, this version reads {FORMAT!r}")
    return record


@contextmanager
def _hashes(files: list[Path]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Hashes files beside the work; the function waits for the results."""
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


def dtype_of(name: str) -> np.dtype:
    """The dtype that an option names."""
    return next(dtype for dtype in DTYPES.values() if str(dtype) == name)
