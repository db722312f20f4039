"""Finds the folder of a model: a local folder, the model that comes with the package, or a repository on the Hugging Face hub.

Of a repository only the files that a model needs are taken, to the hub's own cache: config.json, generation_config.json, the
tokenizer, the processor, chat templates, and the weights that the index names. Offline, the cache alone answers. Pickles and
code are never downloaded.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.containment import check_entries
from rlens_jax.checkpoints.published import CONFIG, INDEX, SINGLE
from rlens_jax.console import Progress
from rlens_jax.errors import UserError, foreign, suggest
from rlens_jax.files import is_unfinished, read_json_object, shortened
from rlens_jax.mirrors import UNFINISHED, address_of, exists, fetched_folder, place
from rlens_jax.resources import embedded_model

EMBEDDED = "embedded"
"""Name of the model that comes with the package."""
DESCRIPTION = (CONFIG, "generation_config.json", INDEX)
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
NOT_READ = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""Ends of the names of weights in formats that are not read."""
_NOT_FROM_HUB = ", and the hub cannot provide it"
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


@dataclass(frozen=True)
class Source:
    """A model folder and its origin."""

    folder: Path
    name: str
    """Name of the folder, or the repository on the hub."""
    revision: str | None
    """Commit on the hub; None for a local folder."""


def find_source(model: str | Path, *, weights: bool = True) -> Source:
    """The folder of a model and its origin; a repository on the hub is downloaded unless it is in the cache.

    Args:
        model: path of a folder, address of one on a store, "embedded", or a repository such as "Qwen/Qwen2-VL-7B-Instruct", with
            "@" and a branch, tag or commit if it is not the main branch. A local folder of that name comes first.
        weights: whether the weights are needed; without them only small files are downloaded.

    Raises:
        UserError: there is no such folder, and the hub cannot provide it.
    """
    if str(model) == EMBEDDED:
        return Source(embedded_model(), EMBEDDED, None)
    path = place(model)
    if address_of(path) is not None:
        _stage(path, weights)
    try:
        if path.is_dir():
            if is_unfinished(path.absolute()) or orbax_store.is_unfinished(path):
                raise UserError(f"{path}: a killed conversion left this folder; convert again and name the new folder")
            check_entries(path, deep=[orbax_store.STORE])
            return Source(path, path.resolve().name, None)
        if path.exists():
            raise UserError(f"{path}: is a file; name the folder of the model")
        siblings = [entry.name for entry in path.parent.glob("*/")]
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise UserError(f"{shortened(str(path))}: cannot be read ({error.strerror})") from None
    on_hub = _HUB_NAME.fullmatch(str(model))
    near = suggest(path.name, [*siblings, EMBEDDED])
    if on_hub is None:
        raise UserError(f"{path}: no such folder{near}; name the folder of a model, {EMBEDDED!r}, or a name on the hub")
    with foreign(f"{model}: no such folder{near}{_NOT_FROM_HUB}"):
        folder = _description(on_hub["name"], on_hub["revision"])
    if weights:
        _add_weights(on_hub["name"], folder)
    check_entries(folder)
    return Source(folder, on_hub["name"], folder.name)


def find_model(model: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model. Arguments and errors as of `find_source`."""
    return find_source(model, weights=weights).folder


def at_revision(model: str, revision: str | None) -> str:
    """The name of a model at a revision of its repository.

    Raises:
        UserError: the model is no repository on the hub, or names another revision itself.
    """
    if revision is None:
        return model
    on_hub = None if Path(model).exists() else _HUB_NAME.fullmatch(model)
    if on_hub is None:
        raise UserError(f"{model}: only a name on the hub has a --revision")
    if on_hub["revision"] not in (None, revision):
        raise UserError(f"{model}: names another revision than --revision {revision}")
    return f"{on_hub['name']}@{revision}"


@cache
def _stage(path: Path, weights: bool) -> None:
    """Download a folder on a store to the path that stands for it, once per process, so that all callers see one version.

    Orbax reads its store from where it is: the local folder of that name stays empty.
    """
    if exists(path / UNFINISHED):
        raise UserError(f"{path}: a conversion writes this folder or was killed; wait for it to end, or convert again")
    left_out = NOT_READ if weights else (*NOT_READ, ".safetensors")
    fetched_folder(path, lambda name: not name.startswith(".") and not name.endswith(left_out))
    store = path / orbax_store.STORE
    if exists(store):
        store.mkdir(parents=True, exist_ok=True)
    elif store.is_dir():
        store.rmdir()


@cache
def _description(name: str, revision: str | None) -> Path:
    """The folder of a repository in the hub's cache. Asks the hub once per process, so that all callers see one commit."""
    folder = _fetch(name, revision, (*DESCRIPTION, *TEXT_FILES))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name}: the repository has no {CONFIG}")
    return folder


@cache
def _add_weights(name: str, folder: Path) -> None:
    """Download those weights of a repository that its folder lacks."""
    if not (folder / INDEX).is_file():
        for pattern in (SINGLE, "*.safetensors"):
            if not list(folder.glob("*.safetensors")):
                with foreign(f"{name}: the cache has no weights{_NOT_FROM_HUB}"):
                    _fetch(name, folder.name, [pattern])
        return
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    listed = dict.fromkeys(weight_map.values() if isinstance(weight_map, dict) else [])
    missing = [file for file in listed if isinstance(file, str) and not (folder / file).is_file()]
    if missing:
        with Progress(f"downloading {name}", len(missing), "files") as shown:
            for file in missing:
                with foreign(f"{name}: the cache has no {file}{_NOT_FROM_HUB}"):
                    _fetch(name, folder.name, [glob.escape(file)])
                shown.advance()


def _fetch(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Imported here because only names on the hub need it.
    from huggingface_hub import snapshot_download

    # A pattern's * also matches /, and no model has files in sub-folders.
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
