"""Models by their name on the Hugging Face hub: downloaded once, kept in its own cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from rlens_jax.checkpoints.checkpoint import find_model
from rlens_jax.errors import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "LICENSE*")
"""Weights and the small files beside them; no pickles, and no code."""


@dataclass(frozen=True)
class Source:
    """A model folder, and where it comes from."""

    folder: Path
    name: str
    revision: str | None
    """The commit on the hub."""


def find_source(name: str, revision: str | None) -> Source:
    """A local folder, or else a repository of the hub, downloaded where it is not in the cache yet.

    Args:
        name: a folder's path, "embedded", or a repository such as "Qwen/Qwen2-VL-7B-Instruct".
        revision: a branch, tag or commit of the repository; None for a local folder or the main branch.

    Raises:
        UserError: there is neither, or the hub cannot be reached.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        if revision is not None:
            raise UserError(f"{name}: a local folder has no --revision")
        folder = find_model(name)
        return Source(folder, folder.resolve().name, None)
    # Imported here because only names of the hub need it.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub and its transports have dozens of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder, and not to be had from the hub ({reason})") from None
    return Source(folder, name, folder.name)
