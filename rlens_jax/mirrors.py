"""Local mirrors of remote stores: `gs://bucket/a/b` stands for `CACHE/stores/gs/bucket/a/b`, and the other way round.

So all other code reads and writes local files. Where a path enters, `place` turns an address into the path of its mirror;
`fetched` and `fetched_folder` download what it lacks; `publish` and `claimed` write to the store. All leave ordinary paths
alone.

A file is downloaded again if the object has another version, or if the local file was changed since. A killed download leaves
only a hidden file, which is not used.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rlens_jax import stores
from rlens_jax.errors import UserError
from rlens_jax.resources import cache_folder
from rlens_jax.store_locks import StoreLock

UNFINISHED = ".unfinished"
"""The lock of a folder that is being written: as long as it is there, the folder is not complete."""
PARTS, LOCK, TRIAL = ".parts", ".lock", ".trial"
"""Ends of the names of a log's folder of parts, of a lock and of what `check_writable` writes."""


def _root() -> Path:
    return (cache_folder() / "stores").absolute()


def place(text: str | Path) -> Path:
    """The local path that stands for an address; any other text is a path itself.

    Raises:
        UserError: the address has no bucket, a name that no local file can have, or one slash behind its scheme.
    """
    split = stores.split_address(str(text))
    if split is None:
        return Path(text)
    scheme, name = split
    if not name or any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > 240 for part in name.split("/")):
        raise UserError(f"{text}: not the address of a folder or an object, such as {scheme}://bucket/folder")
    return _root() / scheme / name


def address_of(path: Path) -> str | None:
    """The address that a path stands for, None for an ordinary path."""
    try:
        scheme, *names = path.absolute().relative_to(_root()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(names)}" if names else None


def with_addresses(text: str) -> str:
    """A message in which addresses stand for their mirrors."""
    return re.sub(re.escape(f"{_root()}/") + r"([A-Za-z][A-Za-z0-9+.-]+)/", r"\1://", text)


def fetched(path: Path) -> Path:
    """The path, after its object was downloaded if it stands for one; if there is no such object, there is no file."""
    address = address_of(path)
    if address is not None:
        found = stores.found(address)
        if found is None:
            path.unlink(missing_ok=True)
        else:
            _download(path, address, found)
    return path


def fetched_files(paths: Sequence[Path]) -> None:
    """`fetched` for several files, several at the same time."""
    if any(address_of(path) for path in paths):
        stores.for_each(fetched, paths)


def fetched_folder(path: Path, wanted: Callable[[str], bool], *, deep: bool = False) -> Path:
    """The path, after the objects under it were downloaded if it stands for a folder of a store.

    Files that are not on the store any more are removed; a folder without objects is not made.

    Args:
        path: any path.
        wanted: whether to download an object, by its name relative to `path`; others are neither downloaded nor removed.
        deep: whether to look into folders of the folder.
    """
    address = address_of(path)
    if address is None:
        return path
    objects = {item.name: item for item in stores.listed(address, deep=deep) if _is_name(item.name) and wanted(item.name)}
    for file in [file for file in (path.rglob("*") if deep else path.glob("*")) if file.is_file()]:
        name = file.relative_to(path).as_posix()
        if name not in objects and wanted(name) and not file.name.endswith(LOCK):
            file.unlink(missing_ok=True)
    items = list(objects.items())
    stores.for_each(lambda item: _download(path / item[0], f"{address}/{item[0]}", item[1]), items)
    return path


def fetched_run(path: Path) -> Path:
    """`fetched_folder` for the folder of a run: everything but its logs, which are read when they are opened."""

    def wanted(name: str) -> bool:
        first, *rest = name.split("/")
        return first != "compiled" and not any(part.endswith((PARTS, LOCK)) for part in (first, *rest[:-1]))

    return fetched_folder(path, wanted, deep=True)


def exists(path: Path) -> bool:
    """Whether there is a file or folder, on the store if the path stands for an address."""
    address = address_of(path)
    return path.exists() if address is None else bool(stores.found(address) or stores.listed(address))


def files_under(path: Path) -> list[Path]:
    """All files in a folder and its folders, sorted; those of an address are there by name only."""
    address = address_of(path)
    if address is None:
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(path / item.name for item in stores.listed(address) if _is_name(item.name))


def size(*paths: Path) -> int:
    """Bytes of some files together, on the store if they are not on the disk. OSError for one that is not there."""
    stored = [path for path in paths if address_of(path) is not None and not path.exists()]
    there = stores.for_each(stores.found, [str(address_of(path)) for path in stored])
    if missing := [path for path, item in zip(stored, there, strict=True) if item is None]:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(missing[0]))
    return sum(item.size for item in there if item) + sum(path.stat().st_size for path in paths if path not in set(stored))


def sha256(path: Path) -> str:
    """SHA-256, in hex, of a file, on the store if it is not on the disk. OSError if it cannot be read."""
    address = address_of(path)
    if address is not None and not path.exists():
        return stores.sha256(address)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_taken(folder: Path) -> bool:
    """Whether there is something where a new folder is to be made: on a store, not what a killed process left."""
    address = address_of(folder)
    if address is None:
        return folder.exists()
    names = [item.name for item in stores.listed(address)]
    return bool(names) and not any(name.startswith(f"{UNFINISHED}/") for name in names)


def publish(path: Path, content: bytes) -> None:
    """Write the object that a path stands for, if any."""
    if (address := address_of(path)) is not None:
        stores.put(address, content)


def check_writable(path: Path) -> None:
    """Raise UserError, with the name of the object beside it that was tried, unless a path's object can be written and deleted.

    To replace an object takes the permission to delete. An ordinary path is left alone.
    """
    if (address := address_of(path)) is not None:
        stores.put(f"{address}{TRIAL}", b"")
        stores.delete(f"{address}{TRIAL}")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While the body makes a new folder that stands for an address, keep the address; at the end, upload the folder.

    The local folder is removed afterwards. An ordinary folder is left alone. The folder is complete when its lock is deleted,
    which is the last step; what a killed process uploaded is deleted first.

    Raises:
        UserError: the address has objects already, or another process is writing there.
    """
    address = address_of(folder)
    if address is None:
        yield
        return
    if is_taken(folder):
        raise UserError(f"{address}: exists already; name a new folder or remove it")
    lock = StoreLock(f"{address}/{UNFINISHED}", address)
    try:
        _delete_all(address)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            stores.for_each(stores.upload, paths, [f"{address}/{path.relative_to(folder).as_posix()}" for path in paths])
            lock.check()
        except BaseException:
            with suppress(UserError):  # the store may be what failed
                _delete_all(address)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def _delete_all(address: str) -> None:
    names = [item.name for item in stores.listed(address) if not item.name.startswith(f"{UNFINISHED}/")]
    stores.for_each(stores.delete, [f"{address}/{name}" for name in names])


def _is_name(name: str) -> bool:
    """Whether an object can be a file in its folder: no marker of a folder, and no way out."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))


def _download(path: Path, address: str, item: stores.Stored) -> None:
    record = _root().with_name("store_versions") / hashlib.sha256(address.encode()).hexdigest()
    with suppress(OSError, ValueError):
        if json.loads(record.read_text()) == [item.version, item.size, *_identity(path)]:
            return
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stores.download(address, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}")
        temporary.write_text(json.dumps([item.version, item.size, *_identity(path)]))
        temporary.replace(record)
    except OSError as error:
        raise UserError(f"{address}: cannot be copied to {_root()} ({error.strerror}); XDG_CACHE_HOME names the folder") from None


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
