"""The safetensors of a published checkpoint, opened together and matched with the family's table."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rlens_jax.checkpoints.safetensors_file import DTYPES, Entry, entries
from rlens_jax.errors import UserError
from rlens_jax.families.hf_config import read_json
from rlens_jax.families.table import Found, Ignored, Problems, Table, match

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHUNK = 1 << 22
"""Numbers that are looked at together."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of the index, or model.safetensors, or all there are."""
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise UserError(f"{folder}: holds both {INDEX} and {SINGLE}; remove the one that does not belong")
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else {""}
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{folder / INDEX}: weight_map must map tensor names to file names")
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not files and pickled:
        raise UserError(
            f"{folder}: holds only pickled weights ({pickled[0]}), which can run code when opened and are "
            "never read here; save the model again as safetensors"
        )
    if not files:
        raise UserError(f"{folder}: holds no weights (*.safetensors)")
    return files


@dataclass(frozen=True)
class Published:
    """A checkpoint's tensors: those of the model, and those that the family is known not to need."""

    table: Table
    matched: dict[str, Found]
    """By the table's spelling; copies (a tied head) are among them."""
    entries: list[tuple[Path, Entry]]
    """All tensors of all files, in their order and spelling."""
    ignored: dict[str, Ignored]
    """By the file's spelling."""
    _read: Callable[[Found], np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """A tensor, by the table's spelling."""
        return self._read(self.matched[name])

    def check_copies(self, problems: Problems) -> None:
        """Adds each copy that differs from its original."""
        for name, original in (self.table.copies or {}).items():
            if name in self.matched and not _same_bits(self.read(name), self.read(original)):
                item, other = self.matched[name], self.matched[original].name
                problems.add(item.file, item.name, f"differs from {other}, though config.json says tie_word_embeddings")


@contextmanager
def opened(files: list[Path], table: Table, problems: Problems) -> Iterator[Published]:
    """The tensors of `files`.

    Raises:
        UserError: a file is not complete, or the tensors are not those of the table; all that does not fit is in one
            message.
    """
    with ExitStack() as stack:
        handles = {path.name: stack.enter_context(_open(path)) for path in files}
        listed = [(path, entry) for path in files for entry in entries(path)]
        ignored = {}
        for path, entry in listed:
            reason = _ignored(table, entry.name)
            if reason is not None:
                ignored[entry.name] = reason
            elif entry.dtype not in DTYPES:
                supported = ", ".join(DTYPES)
                problems.add(path.name, entry.name, f"has dtype {entry.dtype}, supported are {supported}")
        found = [Found(entry.name, path.name, entry.shape) for path, entry in listed]
        matched = match(table, found, problems)
        problems.raise_any()
        yield Published(table, matched, listed, ignored, lambda item: handles[item.file].get_tensor(item.name))


def all_finite(array: np.ndarray) -> bool:
    """Whether a contiguous float array holds no NaN and no infinity; looks at the exponents' bits, which is fast."""
    bits = array.reshape(-1).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    without_sign = np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)
    return all((bits[start : start + CHUNK] & without_sign).max() < infinity for start in range(0, bits.size, CHUNK))


def _ignored(table: Table, name: str) -> Ignored | None:
    spelled = table.published_name(name)
    return next((ignored for ignored in table.ignored if re.fullmatch(ignored.source, spelled)), None)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None
