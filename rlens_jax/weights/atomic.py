"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlens_jax.errors import UserError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which becomes `folder` at the end; a killed process leaves only it.

    Raises:
        UserError: `folder` exists already, or cannot be made.
    """
    folder = folder.absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder or remove it")
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        yield partial
        _sync(partial)
        partial.rename(folder)
        _sync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    """Brings all of `folder` to disk before its name: a power cut leaves no finished name on empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
