"""Our format of model folders: an Orbax checkpoint in the subfolder `orbax`, next to the config.json of the source.

Each layer of a stacked parameter is a leaf on disk. So saving and loading need the memory of the model and one layer, and each
layer is loaded directly into its sharding. Arrays are restored bit for bit, bfloat16 included.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import orbax.checkpoint.experimental.v1.partial as ocp_partial
from etils.epath.gpath import PosixGPath

from rlens_jax.checkpoints.leaves import Filler, by_layer, shapes_of, unstacked
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.table import Problems
from rlens_jax.mirrors import address_of, files_under

Out = TypeVar("Out")

STORE = "orbax"
CHUNK_BYTES = 1 << 26
"""Max bytes per stored chunk; with small chunks a shard is read without the rest of its array."""


def is_store(folder: Path) -> bool:
    """Whether a model folder is in this format."""
    return (folder / STORE).is_dir()


def is_unfinished(folder: Path) -> bool:
    """Whether a killed process left an unfinished store in a model folder."""
    return not is_store(folder) and any(folder.glob(f"{STORE}.*"))


def files(folder: Path) -> list[Path]:
    """All files of the store, sorted; those of a folder that stands for an address are not on the disk."""
    return files_under(folder / STORE)


class Writer:
    """Writes a store layer by layer; an unfinished store is not recognised as one."""

    def __init__(self, folder: Path):
        self._path = (folder / STORE).absolute()
        self._context = _context()
        # Weights hardly compress, and compression takes four times as long as writing.
        self._context.array.saving.use_compression = False
        self._context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES

    def add(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Write some leaves, by `leaf_name`."""
        with self._context:
            ocp_partial.save(self._path, dict(leaves))

    def finish(self) -> None:
        """Complete the store after its last leaf."""
        with self._context:
            ocp_partial.finalize(self._path)


class Reader:
    """Reads the leaves of a store, whose description is read once. UserError when the store is damaged."""

    def __init__(self, folder: Path):
        self._path = _path_to_read(folder)
        self._stored = _metadata(self._path)

    @property
    def names(self) -> list[str]:
        """The names of all leaves."""
        return list(self._stored)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], problems: Problems) -> None:
        """Add a problem for each stored leaf that does not fit `expected`, by name, and for each that is missing."""
        for name, leaf in self._stored.items():
            if name not in expected:
                problems.add(STORE, name, f"not known{suggest(name, expected)}")
            elif tuple(leaf.shape) != expected[name]:
                problems.add(STORE, name, f"has shape {list(leaf.shape)}, expected {list(expected[name])}")
        for name in expected:
            if name not in self._stored:
                problems.add(STORE, name, "missing")

    def fill(self, filler: Filler, problems: Problems, check_finite: bool) -> None:
        """Fill a model with the leaves, rounded to the dtype of the model.

        Raises:
            UserError: the store is damaged or does not fit the model; one message lists all problems.
        """
        shapes = shapes_of(filler.abstract)
        places = unstacked(shapes)
        expected = {name: shapes[place.path] if place.layer is None else shapes[place.path][1:] for name, place in places.items()}
        self.check_shapes(expected, problems)
        problems.raise_any()
        finite = {}
        for names in by_layer(places, str, lambda name: 4 * prod(expected[name])):
            targets = {name: filler.target(places[name]) for name in names}
            loaded = _load(self._path, {name: targets.get(name, ocp.PLACEHOLDER) for name in self._stored})
            for name in names:
                finite[name] = filler.put(places[name], loaded[name])
        for name, flag in finite.items():
            if check_finite and not flag:
                problems.add(STORE, name, "holds NaN or infinite values")
        problems.raise_any()

    def groups(self) -> Iterator[list[str]]:
        """The names of leaves that are read together."""
        return by_layer(self._stored, str, lambda name: 4 * prod(self._stored[name].shape))

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read some leaves by name to the host, in their stored dtypes. UserError when one is missing."""
        names = list(names)
        missing = [name for name in names if name not in self._stored]
        if missing:
            raise UserError(f"{self._path}: {missing[0]} is missing; convert the model again")
        wanted = {name: leaf if name in names else ocp.PLACEHOLDER for name, leaf in self._stored.items()}
        loaded = _load(self._path, wanted)
        return {name: np.asarray(loaded[name]) for name in names}


class _LiteralPath(PosixGPath):
    """Path whose `glob` takes only its argument as a pattern; that of etils takes the brackets of a folder's name as one, too."""

    def glob(self, pattern: str) -> Iterator[Self]:
        return (self._new(path) for path in self._backend.glob(f"{glob.escape(str(self))}/{pattern}"))


def _context() -> ocp.Context:
    context = ocp.Context()
    context.file_options.path_class = _LiteralPath
    return context


def _path_to_read(folder: Path) -> Path:
    """The store of a model folder, absolute as Orbax wants it; an address if the folder stands for one."""
    address = address_of(folder / STORE)
    return (folder / STORE).absolute() if address is None else _LiteralPath(address)


def _metadata(path: Path) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        metadata = ocp.metadata(path).metadata
        if not isinstance(metadata, Mapping):  # Orbax has logged why
            raise ValueError("no usable metadata")
        return dict(metadata)

    with _context():
        return _checked(path, read)


def _load(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    context = _context()
    # Only the vocabulary is padded, and `fill` has compared its size with the stored shapes.
    context.array.loading.enable_padding_and_truncation = True
    with context:
        return _checked(path, lambda: dict(ocp.load(path, dict(wanted))))


def _checked(path: Path, read: Callable[[], Out]) -> Out:
    """The result of `read`. Orbax and what it calls raise exceptions of many types for a damaged store."""
    try:
        return read()
    except jax.errors.JaxRuntimeError:  # of the devices, such as too little memory
        raise
    except Exception as error:
        reason = str(error).partition(" [tensorstore_spec")[0] or type(error).__name__
        raise UserError(f"{path}: damaged or not a complete Orbax checkpoint ({reason})") from None
