"""Read and write safetensors files tensor by tensor, in any order.

The format: 8 bytes with the length of a JSON header (little-endian), the header (name -> dtype, shape, offsets into the data),
then the data: all tensors without gaps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rlens_jax.errors import UserError

DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Supported dtypes of parameters, by their names in the format."""
METADATA = "__metadata__"


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
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {index} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None


def dtype_name(dtype: np.dtype) -> str:
    """Name of a dtype of `DTYPES` in the format."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data, and the header, of a complete file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop(METADATA, None)
    return 8 + length, header


def entries(path: Path) -> list[Entry]:
    """The tensors of a complete file, in order of their data."""
    _, header = _header(path)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [
        Entry(name, item["dtype"], tuple(item["shape"]), item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in ordered
    ]


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of one tensor of any dtype."""
    begin, header = _header(path)
    start, stop = header[name]["data_offsets"]
    with path.open("rb") as file:
        file.seek(begin + start)
        return file.read(stop - start)


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
