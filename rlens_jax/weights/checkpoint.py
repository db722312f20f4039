"""Reading a model folder: config.json with published safetensors (one file or shards) or our Orbax store."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from rlens_jax.errors import UserError, suggest
from rlens_jax.models import ModelKind, read_kind
from rlens_jax.models.hf_config import read_json
from rlens_jax.resources import embedded_model
from rlens_jax.weights import orbax_store
from rlens_jax.weights.leaves import Filler, shapes_of
from rlens_jax.weights.table import Found, Problems, match
from rlens_jax.weights.tables import table_of

EMBEDDED = "embedded"
"""Names the model that comes with the package."""
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
READABLE_DTYPES = ("F32", "F16", "BF16")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_model(model: str | Path) -> Path:
    """The folder of a model: "embedded" for the one that comes with the package, or a path.

    Raises:
        UserError: there is no such folder.
    """
    if str(model) == EMBEDDED:
        return embedded_model()
    path = Path(model)
    if path.is_dir():
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
    model: str | Path, dtype: DTypeLike, check_finite: bool = True
) -> tuple[ModelKind, nnx.Module]:
    """The model in a folder, its weights rounded to `dtype`.

    Tensors are read one at a time into stacked parameters: the peak is the model, a parameter and a tensor.

    Args:
        model: a folder, or "embedded".
        dtype: of the parameters; float32 or bfloat16.
        check_finite: refuse weights that are not finite.

    Raises:
        UserError: no such folder, or its config.json or weights cannot be used; all that is wrong with the
            weights is in one message.
    """
    folder = find_model(model)
    kind = read_model_kind(folder)
    filler = Filler(kind.abstract(dtype))
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


def _fill_from_safetensors(
    files: list[Path], kind: ModelKind, filler: Filler, problems: Problems, check_finite: bool
) -> None:
    table = table_of(kind)
    table.check_covers(shapes_of(filler.abstract))
    with ExitStack() as stack:
        opened = {path.name: stack.enter_context(_open(path)) for path in files}
        found = []
        for name, file in opened.items():
            for tensor in file.keys():  # noqa: SIM118  (not a dict)
                header = file.get_slice(tensor)
                found.append(Found(tensor, name, tuple(header.get_shape())))
                if header.get_dtype() not in READABLE_DTYPES:
                    supported = ", ".join(READABLE_DTYPES)
                    problems.add(name, tensor, f"has dtype {header.get_dtype()}, supported are {supported}")
        matched = match(table, found, problems)
        problems.raise_any()

        def read(item: Found) -> np.ndarray:
            return opened[item.file].get_tensor(item.name)

        for name, original in (table.copies or {}).items():
            if name in matched and not _same_bits(read(matched[name]), read(matched[original])):
                item = matched[name]
                why = f"differs from {matched[original].name}, though config.json says tie_word_embeddings"
                problems.add(item.file, item.name, why)
        for name, tensor in table.tensors.items():
            item = matched[name]
            array = read(item)
            if check_finite and not np.isfinite(array).all():
                problems.add(item.file, item.name, "holds NaN or infinite values")
            for place, part in zip(tensor.places, tensor.to_ours(array), strict=True):
                filler.put(place, part)
        problems.raise_any()


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from None
