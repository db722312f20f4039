"""Keeps a model folder to itself: names that files give stay inside it, and so do links.

The one exception is the hub's cache, where `models--X/snapshots/COMMIT/FILE` is a link to `models--X/blobs/HASH`.
"""

import stat
from collections.abc import Iterable
from pathlib import Path

from rlens_jax.errors import UserError
from rlens_jax.files import quoted

WEIGHTS = ".safetensors"
_LONGEST_NAME = 255
"""Bytes, on all usual file systems."""


def inside(folder: Path, name: object, source: Path) -> Path:
    """The path of a file of weights in `folder`, to read or to write, whose name the file `source` gives.

    Raises:
        UserError: it is not the plain name of a safetensors file: it is a path, is hidden, cannot exist, or is another file's.
    """
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    if not isinstance(name, str) or not plain or not name.endswith(WEIGHTS) or len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"{source}: {quoted(name)} is not the name of a *{WEIGHTS} file in this folder")
    return folder / name


def check_entries(folder: Path, deep: Iterable[str] = ()) -> None:
    """Check what a model folder holds, before anything in it is opened; hidden entries are never opened.

    Args:
        folder: the model folder.
        deep: sub-folders that are read with all that is in them; others are never entered.

    Raises:
        UserError: a link leaves the folder or leads nowhere, an entry is neither a file nor a folder (opening a FIFO would
            wait for ever), or the folder cannot be listed.
    """
    try:
        root = folder.resolve()
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for name in deep:
            entries += (folder / name).rglob("*")
        for path in sorted(entries):
            _check_entry(path, root)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _check_entry(path: Path, root: Path) -> None:
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop
            raise UserError(f"{path}: is a link that leads nowhere; remove it or put the file in its place") from None
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not target.is_relative_to(root) and target.parent != blobs:
            raise UserError(f"{path}: is a link out of the model folder, to {target}; put the file itself in its place")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is neither a file nor a folder; remove it")
