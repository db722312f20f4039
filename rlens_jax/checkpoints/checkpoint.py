"""Reading a model folder: config.json with published safetensors (one file or shards) or our Orbax store."""

import hashlib
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.atomic import is_unfinished
from rlens_jax.checkpoints.leaves import Filler, shapes_of
from rlens_jax.checkpoints.published import opened, weight_files
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.hf_config import read_json
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.families.table import Problems
from rlens_jax.families.tables import table_of
from rlens_jax.resources import embedded_model

EMBEDDED = "embedded"
"""Names the model that comes with the package."""
CONFIG = "config.json"


def find_model(model: str | Path) -> Path:
    """The folder of a model: "embedded" for the one that comes with the package, or a path.

    Raises:
        UserError: there is no such folder.
    """
    if str(model) == EMBEDDED:
        return embedded_model()
    path = Path(model)
    if path.is_dir():
        if is_unfinished(path.absolute()) or orbax_store.is_unfinished(path):
            raise UserError(f"{path}: is what a killed conversion left; convert again and name the new folder")
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; name the folder of the model")
    siblings = [entry.name for entry in path.parent.glob("*/")]
    near = suggest(path.name, [*siblings, EMBEDDED])
    raise UserError(f"{path}: no such folder{near}; name a model's folder, or {EMBEDDED!r}")


def read_model_kind(model: str | Path) -> ModelKind:
    """What a model folder's config.json describes; see `find_model` and `read_kind` for what can be wrong."""
    path = find_model(model) / CONFIG
    return read_kind(read_json(path), str(path))


def load_model(
    model: str | Path,
    dtype: DTypeLike,
    check_finite: bool = True,
    mesh: Mesh | None = None,
) -> tuple[ModelKind, nnx.Module]:
    """The model in a folder, its weights rounded to `dtype`.

    Tensors are read one at a time and written into stacked parameters in place: the peak is the model and a tensor, or
    a layer of an Orbax store, of which each process reads its own shards only.

    Args:
        model: a folder, or "embedded".
        dtype: of the parameters; float32 or bfloat16.
        check_finite: refuse weights that are not finite.
        mesh: each parameter is cut over it as `rlens_jax.sharding.mesh` says; by default all are on the first device.

    Raises:
        UserError: no such folder, or its config.json or weights cannot be used; all that is wrong with the
            weights is in one message.
    """
    folder = find_model(model)
    kind = read_model_kind(folder)
    filler = Filler(kind.abstract(dtype), mesh)
    problems = Problems(str(folder))
    if orbax_store.is_store(folder):
        orbax_store.fill(folder, filler, problems, check_finite)
    else:
        _fill_from_safetensors(weight_files(folder), kind, filler, problems, check_finite)
    return kind, filler.model()


def model_hash(model: str | Path) -> str:
    """SHA-256, in hex, over config.json and all weight files of a model folder and their names within it."""
    folder = find_model(model)
    total = hashlib.sha256()
    weights = orbax_store.files(folder) if orbax_store.is_store(folder) else weight_files(folder)
    for path in [folder / CONFIG, *weights]:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})") from None
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _fill_from_safetensors(
    files: list[Path], kind: ModelKind, filler: Filler, problems: Problems, check_finite: bool
) -> None:
    table = table_of(kind)
    table.check_covers(shapes_of(filler.abstract))
    with opened(files, table, problems) as published:
        published.check_copies(problems)
        finite = []
        for name, tensor in table.tensors.items():
            for place, part in zip(tensor.places, tensor.to_ours(published.read(name)), strict=True):
                finite.append((published.matched[name], filler.put(place, filler.held(place, part))))
        for item in dict.fromkeys(item for item, flag in finite if check_finite and not flag):
            problems.add(item.file, item.name, "holds NaN or infinite values")
    problems.raise_any()
