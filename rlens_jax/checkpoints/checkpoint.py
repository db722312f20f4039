"""Find and load model folders: config.json with published safetensors (one file or several) or with our Orbax store."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.leaves import Filler, shapes_of
from rlens_jax.checkpoints.published import CONFIG, opened, weight_files
from rlens_jax.errors import UserError, suggest
from rlens_jax.families.hf_files import read_json_object
from rlens_jax.families.registry import ModelKind, read_kind
from rlens_jax.families.table import Problems
from rlens_jax.files import is_unfinished
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.resources import embedded_model

EMBEDDED = "embedded"
"""Name of the model that comes with the package."""
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "LICENSE*")
"""Files downloaded from the hub: weights and small files, but no pickles and no code."""


@dataclass(frozen=True)
class Source:
    """A model folder and its origin."""

    folder: Path
    name: str
    revision: str | None
    """Commit on the hub; None for a local folder."""


def find_model(model: str | Path) -> Path:
    """The folder of a model: "embedded" for the model that comes with the package, or a path.

    Raises:
        UserError: there is no such folder.
    """
    if str(model) == EMBEDDED:
        return embedded_model()
    path = Path(model)
    if path.is_dir():
        if is_unfinished(path.absolute()) or orbax_store.is_unfinished(path):
            raise UserError(f"{path}: a killed conversion left this folder; convert again and name the new folder")
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; name the folder of the model")
    siblings = [entry.name for entry in path.parent.glob("*/")]
    near = suggest(path.name, [*siblings, EMBEDDED])
    raise UserError(f"{path}: no such folder{near}; name the folder of a model, or {EMBEDDED!r}")


def find_source(name: str, revision: str | None) -> Source:
    """A local folder, or else a repository on the Hugging Face hub, downloaded unless it is in the cache.

    Args:
        name: path of a folder, "embedded", or a repository such as "Qwen/Qwen2-VL-7B-Instruct".
        revision: branch, tag or commit of the repository; None for a local folder or the main branch.

    Raises:
        UserError: neither exists, or the hub cannot be reached.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        if revision is not None:
            raise UserError(f"{name}: a local folder has no --revision")
        folder = find_model(name)
        return Source(folder, folder.resolve().name, None)
    # Imported here because only names on the hub need it.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub and its transports have dozens of exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder, and the hub cannot provide it ({reason})") from None
    return Source(folder, name, folder.name)


def read_model_kind(model: str | Path) -> ModelKind:
    """Family and sizes of the model in a folder, from its config.json. Raises UserError as `find_model` and `read_kind`."""
    path = find_model(model) / CONFIG
    return read_kind(read_json_object(path), str(path))


def load_model(
    model: str | Path, dtype: DTypeLike, check_finite: bool = True, mesh: Mesh | None = None
) -> tuple[ModelKind, VisionLanguageModel]:
    """Load a model with its weights rounded to `dtype`.

    Tensors are read one at a time and written into stacked parameters in place: the peak memory is the model and one tensor,
    or the model and one layer for an Orbax store, of which each process reads its own shards only.

    Args:
        model: a folder, or "embedded".
        dtype: dtype of the parameters; float32 or bfloat16.
        check_finite: refuse weights that are not finite.
        mesh: parameters are split over it as in `rlens_jax.sharding.mesh`; None puts all on the first device.

    Raises:
        UserError: the folder does not exist, or its config.json or weights are not usable; one message lists all problems
            with the weights.
    """
    folder = find_model(model)
    kind = read_model_kind(folder)
    filler = Filler(kind.abstract(dtype), mesh)
    problems = Problems(str(folder))
    if orbax_store.is_store(folder):
        orbax_store.fill(folder, filler, problems, check_finite)
        return kind, filler.model()
    table = kind.table()
    table.check_covers(shapes_of(filler.abstract))
    with opened(weight_files(folder), table, problems) as published:
        published.check_copies(problems)
        finite = []
        for name, tensor in table.tensors.items():
            for place, part in zip(tensor.places, tensor.to_ours(published.read(name)), strict=True):
                finite.append((published.matched[name], filler.put(place, filler.held(place, part))))
        for item in dict.fromkeys(item for item, flag in finite if check_finite and not flag):
            problems.add(item.file, item.name, "holds NaN or infinite values")
    problems.raise_any()
    return kind, filler.model()


def model_hash(model: str | Path) -> str:
    """SHA-256, in hex, over config.json and all weight files of a model folder and their names in it."""
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
