"""Folders that appear whole or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlens_jax.errors import UserError

SUFFIX = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_unfinished(folder: Path) -> bool:
    """Whether this is a folder that `new_folder` is writing, or was when its process was killed."""
    return folder.name.startswith(".") and folder.name.endswith(SUFFIX)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which becomes `folder` at the end.

    A killed process leaves only the hidden one, which the next attempt removes: it is locked as long as its process
    lives, wherever that runs.

    Raises:
        UserError: `folder` exists already or cannot be made, or the disk is full.
    """
    folder = folder.absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder or remove it")
    partial = folder.parent / f".{folder.name}.{os.getpid()}{SUFFIX}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        _sync(partial)
        if folder.exists():
            raise UserError(f"{folder}: was made by another process meanwhile; name a new folder or remove it")
        partial.rename(folder)
        _sync_directory(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise UserError(f"{folder}: the disk is full; nothing was kept, free some space first") from None
        raise
    finally:
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left of earlier attempts at `folder`."""
    for left in folder.parent.glob(f".{folder.name}.*{SUFFIX}"):
        lock = os.open(left, os.O_RDONLY)
        try:
            with suppress(BlockingIOError):  # locked: its process is at work
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
        finally:
            os.close(lock)


def _is_disk_full(error: BaseException) -> bool:
    """Python's own error, or TensorStore's, which only its text tells."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, ValueError) and any(f"os_error_code='{code}'" in str(error) for code in FULL)


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
