"""Our own format: an Orbax checkpoint, one leaf a layer, in `orbax` beside the source's config.json.

Stacked parameters are cut into layers on disk, so that saving and loading hold one layer beside the model, and each layer
goes straight into the sharding that it is asked for.
Arrays come back bit for bit, bfloat16 included.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import orbax.checkpoint.experimental.v1.partial as ocp_partial
from flax import nnx

from rlens_jax.checkpoints.atomic import new_folder
from rlens_jax.checkpoints.leaves import Filler, arrays_of, read_place, shapes_of, together, unstacked
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.registry import read_kind
from rlens_jax.families.table import Place, Problems

Out = TypeVar("Out")

STORE = "orbax"
CHUNK_BYTES = 1 << 26
"""Arrays are stored in chunks of at most this, so that a shard is read without reading the whole."""


def is_store(folder: Path) -> bool:
    """Whether a model folder is in this format."""
    return (folder / STORE).is_dir()


def is_unfinished(folder: Path) -> bool:
    """Whether a killed process left a store in a model folder before it was finished."""
    return not is_store(folder) and any(folder.glob(f"{STORE}.*"))


def files(folder: Path) -> list[Path]:
    """All files of the weights, sorted."""
    return sorted(path for path in (folder / STORE).rglob("*") if path.is_file())


class Writer:
    """Writes a store layer by layer; what is not finished does not look like a store."""

    def __init__(self, folder: Path):
        self._path = folder / STORE
        self._context = ocp.Context()
        # Weights hardly compress, and trying takes four times as long as writing.
        self._context.array.saving.use_compression = False
        self._context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES

    def add(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Writes some leaves, by `leaf_name`."""
        with self._context:
            ocp_partial.save(self._path, dict(leaves))

    def finish(self) -> None:
        """All leaves are there."""
        with self._context:
            ocp_partial.finalize(self._path)


def save(folder: str | Path, model: nnx.Module, config_json: Mapping[str, Any]) -> None:
    """Writes `folder` whole or not at all; `load_model` reads it.

    Args:
        folder: must not exist yet.
        model: its parameters are written as they are.
        config_json: the fields of the source's config.json, kept unchanged.

    Raises:
        UserError: the folder exists, or `config_json` describes no supported model.
        ValueError: the model does not have the sizes that `config_json` says.
    """
    arrays, shapes = arrays_of(model), shapes_of(model)
    if shapes != shapes_of(read_kind(config_json, "config.json").abstract(np.float32)):
        raise ValueError("the model does not have the sizes that config_json says")
    places = unstacked(shapes)
    with new_folder(Path(folder)) as unfinished:
        writer = Writer(unfinished)
        for names in _pieces(_layer_shapes(shapes, places)):
            writer.add({name: read_place(arrays, places[name]) for name in names})
        writer.finish()
        (unfinished / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")


def fill(folder: Path, filler: Filler, problems: Problems, check_finite: bool) -> None:
    """Fills a model from a saved folder, rounding to its dtype.

    Raises:
        UserError: the store is damaged or does not fit the model; all that is wrong is in one message.
    """
    path = folder / STORE
    shapes = shapes_of(filler.abstract)
    places = unstacked(shapes)
    expected_shapes = _layer_shapes(shapes, places)
    stored = _metadata(path)
    for name, leaf in stored.items():
        if name not in places:
            problems.add(STORE, name, f"not known{suggest(name, places)}")
        else:
            expected = expected_shapes[name]
            if tuple(leaf.shape) != expected:
                problems.add(STORE, name, f"has shape {list(leaf.shape)}, expected {list(expected)}")
    for name in [name for name in places if name not in stored]:
        problems.add(STORE, name, "missing")
    problems.raise_any()
    finite = {}
    for names in _pieces(expected_shapes):
        targets = {name: filler.target(places[name]) for name in names}
        loaded = _load(path, {name: targets.get(name, ocp.PLACEHOLDER) for name in stored})
        for name in names:
            finite[name] = filler.put(places[name], loaded[name])
    for name, flag in finite.items():
        if check_finite and not flag:
            problems.add(STORE, name, "holds NaN or infinite values")
    problems.raise_any()


class Reader:
    """Reads a store's leaves to the host, as they are stored; UserError when the store is damaged."""

    def __init__(self, folder: Path):
        self._path = folder / STORE
        self._stored = _metadata(self._path)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Some leaves by name; UserError when one is missing."""
        names = list(names)
        missing = [name for name in names if name not in self._stored]
        if missing:
            raise UserError(f"{self._path}: holds no {missing[0]}; convert the model again")
        wanted = {name: leaf if name in names else ocp.PLACEHOLDER for name, leaf in self._stored.items()}
        loaded = _load(self._path, wanted)
        return {name: np.asarray(loaded[name]) for name in names}


def _pieces(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names that are written or read together: those of one layer, or of several small ones."""
    layer = re.compile(r".*?\.layers\.\d+\.|.*")

    def piece(name: str) -> str:
        return layer.match(name)[0]  # type: ignore[index]  # matches everything

    groups = (list(group) for _, group in groupby(sorted(shapes, key=piece), piece))
    return together(groups, lambda name: 4 * prod(shapes[name]))


def _layer_shapes(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is at each place."""
    return {
        name: shapes[place.path] if place.layer is None else shapes[place.path][1:] for name, place in places.items()
    }


def _metadata(path: Path) -> dict[str, Any]:
    return _checked(path, lambda: dict(ocp.metadata(path).metadata))


def _load(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    context = ocp.Context()
    # The only padding asked for is that of the vocabulary, which `fill` has compared with the stored shapes.
    context.array.loading.enable_padding_and_truncation = True
    with context:
        return _checked(path, lambda: dict(ocp.load(path, dict(wanted))))


def _checked(path: Path, read: Callable[[], Out]) -> Out:
    """The result of `read`. Orbax has several ways to say that a store is damaged (None for bad metadata)."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise UserError(f"{path}: damaged or not a complete Orbax checkpoint ({reason})") from None
