"""Our own format: an Orbax checkpoint, one leaf a layer, in `orbax` beside the source's config.json.

Stacked parameters are cut into layers on disk, so that saving and loading hold one layer beside the model.
Arrays come back bit for bit, bfloat16 included.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import orbax.checkpoint.experimental.v1.partial as ocp_partial
from flax import nnx

from rlens_jax.errors import UserError, suggest
from rlens_jax.models import read_kind
from rlens_jax.weights.atomic import new_folder
from rlens_jax.weights.leaves import Filler, arrays_of, read_place, shapes_of, unstacked
from rlens_jax.weights.table import Problems

Out = TypeVar("Out")

STORE = "orbax"


def is_store(folder: Path) -> bool:
    """Whether a model folder is in this format."""
    return (folder / STORE).is_dir()


def files(folder: Path) -> list[Path]:
    """All files of the weights, sorted."""
    return sorted(path for path in (folder / STORE).rglob("*") if path.is_file())


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
        for names in _pieces(places):
            ocp_partial.save(unfinished / STORE, {name: read_place(arrays, places[name]) for name in names})
        ocp_partial.finalize(unfinished / STORE)
        (unfinished / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")


def fill(folder: Path, filler: Filler, problems: Problems, check_finite: bool) -> None:
    """Fills a model from a saved folder, rounding to its dtype.

    Raises:
        UserError: the store is damaged or does not fit the model; all that is wrong is in one message.
    """
    path = folder / STORE
    shapes = shapes_of(filler.abstract)
    places = unstacked(shapes)
    stored = _read(path, lambda: dict(ocp.metadata(path).metadata))
    for name, leaf in stored.items():
        if name not in places:
            problems.add(STORE, name, f"not known{suggest(name, places)}")
        else:
            place = places[name]
            expected = shapes[place.path] if place.layer is None else shapes[place.path][1:]
            if tuple(leaf.shape) != expected:
                problems.add(STORE, name, f"has shape {list(leaf.shape)}, expected {list(expected)}")
    for name in [name for name in places if name not in stored]:
        problems.add(STORE, name, "missing")
    problems.raise_any()
    for names in _pieces(places):
        wanted = {name: stored[name] if name in names else ocp.PLACEHOLDER for name in stored}
        loaded = _read(path, partial(ocp.load, path, wanted))
        for name in names:
            array = np.asarray(loaded[name])
            if check_finite and not np.isfinite(array).all():
                problems.add(STORE, name, "holds NaN or infinite values")
            filler.put(places[name], array)
    problems.raise_any()


def _pieces(names: Iterable[str]) -> list[list[str]]:
    """Names that are written or read together: those of one layer."""
    layer = re.compile(r".*?\.layers\.\d+\.|.*")

    def piece(name: str) -> str:
        return layer.match(name)[0]  # type: ignore[index]  # matches everything

    return [list(group) for _, group in groupby(sorted(names, key=piece), piece)]


def _read(path: Path, read: Callable[[], Out]) -> Out:
    """The result of `read`. Orbax has several ways to say that a store is damaged (None for bad metadata)."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise UserError(f"{path}: damaged or not a complete Orbax checkpoint ({reason})") from None
