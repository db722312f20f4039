"""Read and write safetensors files tensor by tensor, in any order.

The format: 8 bytes with the length of a JSON header (little-endian), the header (name -> dtype, shape, offsets into the data),
then the data: all tensors without gaps.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from rlens_jax.errors import UserError, foreign
from rlens_jax.files import open_file, parse_json

DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Supported dtypes of parameters, by their names in the format."""
METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    """Name in the format, such as "BF16"."""
    shape: tuple[int, ...]
    num_bytes: int


def open_safetensors(path: Path, index: str) -> Any:
    """The `safe_open` handle of a file that `index` names. UserError when the file is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path}: no such file, though {index} names it")
    _header(path)
    with foreign(f"{path}: not a complete safetensors file"):
        return safe_open(path, framework="np")


def dtype_name(dtype: np.dtype) -> str:
    """Name of a dtype of `DTYPES` in the format."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def _header(path: Path) -> tuple[int, dict[str, Entry], dict[str, int]]:
    """Offset of the data, the tensors in order of their data, and where each begins in it.

    Raises:
        UserError: the file cannot be read, its header names a tensor twice, or its tensors do not fill it without gaps.
    """

    def broken(problem: str) -> UserError:
        return UserError(f"{path}: not a complete safetensors file ({problem})")

    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise broken(f"{size} bytes, and a header of {length}")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise broken("the header is no object")
    header.pop(METADATA, None)
    found = []
    for name, item in header.items():
        try:
            (start, stop), shape, dtype = item["data_offsets"], tuple(item["shape"]), item["dtype"]
        except (TypeError, KeyError, ValueError):
            raise broken(f"{name} has no data_offsets, shape and dtype") from None
        if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
            raise broken(f"{name} has other data_offsets, shape or dtype than whole numbers and a name")
        found.append((start, stop, Entry(name, dtype, shape, stop - start)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for start, stop, entry in found:
        if start != end or stop < start or (entry.dtype in DTYPES and entry != entry_of(entry.name, entry.dtype, entry.shape)):
            raise broken(f"{entry.name} has bytes {start} to {stop}, after {end}")
        end = stop
    if 8 + length + end != size:
        raise broken(f"{size} bytes, but its tensors end at {8 + length + end}")
    return 8 + length, {entry.name: entry for _, _, entry in found}, {entry.name: start for start, _, entry in found}


def entries(path: Path) -> list[Entry]:
    """The tensors of a complete file, in order of their data. UserError when the file is damaged."""
    return list(_header(path)[1].values())


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of one tensor of any dtype."""
    begin, tensors, starts = _header(path)
    with path.open("rb") as file:
        file.seek(begin + starts[name])
        return file.read(tensors[name].num_bytes)


class Writer:
    """Context manager that writes a file whose tensors arrive one by one, in any order."""

    def __init__(self, path: Path, tensors: list[Entry]):
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        header: dict[str, Any] = {METADATA: {"format": "pt"}}
        offset = 0
        for entry in tensors:
            end = offset + entry.num_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
            self._places[entry.name] = (offset, entry.num_bytes)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> "Writer":
        self._file = self._path.open("wb")
        self._file.write(self._start)
        return self

    def write(self, name: str, data: np.ndarray | bytes) -> None:
        """Write a tensor, as a contiguous array or as bytes. ValueError if its size differs from its entry."""
        offset, num_bytes = self._places.pop(name)
        view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data)
        if view.nbytes != num_bytes:
            raise ValueError(f"{name}: {view.nbytes} bytes, but its entry has {num_bytes}")
        self._file.seek(len(self._start) + offset)
        self._file.write(view)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if error is None and self._places:
            raise ValueError(f"{self._path}: not written: {sorted(self._places)}")


def entry_of(name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a tensor whose dtype is in `DTYPES`."""
    return Entry(name, dtype, shape, prod(shape) * DTYPES[dtype].itemsize)
