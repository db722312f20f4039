"""Append-only logs of finished work: a header with all that decides the work, then one JSON object per line.

    {"schema": "rlens-journal", "version": 1, "fingerprint": {...}}

A line reaches the disk (one write, one fsync) before `LogWriter.write` returns. A crash can damage only the last line, which is
cut off when the log is opened again. The folder's lock is held while a log is open for writing. It ends with the process.

In a folder that stands for an address (`rlens_jax.mirrors`), the local files are a copy: the log is on the store as objects that
are joined (`rlens_jax.store_logs`), and so is the lock. A line is on the store before `LogWriter.write` returns.

A log without a finished line holds no work: it is removed when it is closed, and after a crash it binds no later run.
"""

import fcntl
import itertools
import json
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlens_jax.errors import UserError
from rlens_jax.files import json_leaves, open_file, parse_json, replace_local
from rlens_jax.mirrors import publish
from rlens_jax.store_logs import StoreLog, check_unused, pull

Item = TypeVar("Item")


@dataclass(frozen=True)
class LogKind(Generic[Item]):
    """A kind of log. Its header has `schema` and `version`."""

    schema: str
    version: int
    noun: str
    """Name of the log in error messages; its file is `noun`.jsonl, its lock `noun`.lock."""
    item: str
    """Name of a line in error messages."""
    decode: Callable[[Any], tuple[Hashable, Item]]
    """Returns the key of a line's JSON value, which is unique in the log, and its item; ValueError for a bad one."""

    @property
    def file_name(self) -> str:
        return f"{self.noun}.jsonl"


class LogWriter:
    """A log's file, open for appending, and the folder's lock. `num_items` is the number of finished lines in the file."""

    def __init__(self, path: Path, noun: str, file: int, lock: int, num_items: int, store: StoreLog | None):
        self._path, self._noun, self._file, self._lock, self._store = path, noun, file, lock, store
        self._empty = num_items == 0

    def write(self, lines: bytes) -> None:
        """Write whole lines to the disk. If that fails, the file is unchanged, and UserError is raised."""
        if self._store is not None:
            self._store.append(lines)
        length = os.fstat(self._file).st_size
        try:
            if os.write(self._file, lines) != len(lines):
                raise OSError(0, "no space left for a whole line")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, length)
            raise UserError(f"cannot write to the {self._noun} {self._path}: {error.strerror}") from error
        self._empty = False

    def close(self) -> None:
        """Close the file, remove it if it has no finished line, and release the folder's lock."""
        if self._empty:
            self._path.unlink(missing_ok=True)
        if self._store is not None:
            try:
                if self._empty:
                    self._store.settle()
            finally:
                self._store.close()
        os.close(self._file)
        os.close(self._lock)


def open_log(
    folder: Path, kind: LogKind[Item], fingerprint: Mapping[str, Any], *, restart: bool = False
) -> tuple[dict[Any, Item], LogWriter, str | None]:
    """Open the log in a folder; both are created if missing.

    Args:
        folder, kind: where and what the log is.
        fingerprint: the nested JSON values that decide the items.
        restart: rename a log that has another fingerprint or is none, and begin a new one. A log of this fingerprint is resumed.

    Returns:
        The items by key, the writer, and a message if an unfinished last line was cut off or a log was renamed.

    Raises:
        UserError: the folder cannot be written, another run uses it, the log has another fingerprint, or a line other than an
            unfinished last one cannot be read.
    """
    path, store = folder / kind.file_name, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, f"{kind.noun}.lock")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    try:
        store = StoreLog.open(path, kind.noun)
        repaired = _make_way(path, kind, fingerprint, restart) if path.exists() else None
        if not path.exists():
            _write_header(path, kind, fingerprint)
        items, length = _read(path, kind, fingerprint)
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        excess = os.fstat(file).st_size - length
        if excess:
            os.ftruncate(file, length)
            os.fsync(file)
            repaired = f"{path}: cut off an unfinished last line of {excess} bytes; {len(items)} finished {kind.item}s are kept"
        if store is not None:
            store.settle()
    except BaseException as error:
        if store is not None:
            store.close()
        os.close(lock)
        if isinstance(error, OSError):
            raise UserError(f"cannot use the {kind.noun} {path}: {error.strerror}") from error
        raise
    return items, LogWriter(path, kind.noun, file, lock, len(items), store), repaired


def read_log(folder: Path, kind: LogKind[Item], fingerprint: Mapping[str, Any]) -> dict[Any, Item]:
    """The items of a log by key, without a lock; UserError as `open_log`, or if there is no log."""
    path = folder / kind.file_name
    pull(path)
    try:
        return _read(path, kind, fingerprint)[0]
    except OSError as error:
        raise UserError(f"cannot read the {kind.noun} {path}: {error.strerror}") from error


def check_free(folder: Path, kind: LogKind[Any]) -> None:
    """Raise UserError if a process has the log of a folder open for writing."""
    check_unused(folder / kind.file_name, kind.noun)
    try:
        lock = os.open(folder / f"{kind.noun}.lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # there is none, or `open_log` says what is wrong
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: the processes of a run check at the same time
    except BlockingIOError:
        raise _in_use(folder, lock) from None
    finally:
        os.close(lock)


def _in_use(folder: Path, lock: int) -> UserError:
    holder = os.read(lock, 32).decode(errors="replace").strip()
    return UserError(f"another run is using {folder} (process {holder}); wait for it to end, or choose another folder")


def _locked(folder: Path, name: str) -> int:
    """A descriptor that holds the folder's lock. UserError if another process holds it."""
    # Not through a link: the file is emptied.
    lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        error = _in_use(folder, lock)
        os.close(lock)
        raise error from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _make_way(path: Path, kind: LogKind[Item], fingerprint: Mapping[str, Any], restart: bool) -> str | None:
    """Remove a log without a finished line, and rename another run's if `restart`; returns a message if one was renamed."""
    with open_file(path) as file:
        header, *lines = list(file) or [b""]
    if _fields(header, kind) is not None and not any(line.endswith(b"\n") for line in lines):
        path.unlink()
    elif restart:
        try:
            _check_header(path, kind, header, fingerprint)
        except UserError:
            names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            publish(aside, path.read_bytes())
            path.rename(aside)
            return f"{path}: the {kind.noun} of another run is now {aside.name}"
    return None


def _write_header(path: Path, kind: LogKind[Item], fingerprint: Mapping[str, Any]) -> None:
    """Create the log with its header, atomically."""
    header = {"schema": kind.schema, "version": kind.version, "fingerprint": fingerprint}
    replace_local(path, json.dumps(header, allow_nan=False).encode() + b"\n")
    # The new name is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, kind: LogKind[Item], fingerprint: Mapping[str, Any]) -> tuple[dict[Any, Item], int]:
    """The items by key, and the length in bytes of the finished lines."""
    with open_file(path) as file:
        header, *lines = list(file) or [b""]
    _check_header(path, kind, header, fingerprint)
    items: dict[Any, Item] = {}
    length = len(header)
    remedy = f"restore the file, or delete the line to make its {kind.item} again"
    for number, line in enumerate(lines, start=2):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            key, item = kind.decode(parse_json(line, "line"))
        except (ValueError, UserError) as error:
            # A crash damages the last line only, and its item is made again.
            if number == len(lines) + 1 and not _is_object(line):
                break
            raise UserError(f"{path}, line {number} cannot be read ({error}); {remedy}") from error
        if key in items:
            raise UserError(f"{path}, line {number} repeats the {kind.item} of an earlier line; {remedy}")
        items[key] = item
        length += len(line)
    return items, length


def _is_object(line: bytes) -> bool:
    """Whether a line is finished and some JSON object: a crash cannot have cut it."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _check_header(path: Path, kind: LogKind[Item], line: bytes, fingerprint: Mapping[str, Any]) -> None:
    header, remedy = (
        _fields(line, kind),
        f"choose another folder, or add --restart, which renames this {kind.noun} and begins a new one",
    )
    if header is None:
        raise UserError(f"{path}, line 1 is not the header of an {kind.schema} log; {remedy}")
    if header.get("version") != kind.version:
        raise UserError(f"{path} has version {header.get('version')}, this program reads {kind.version}; {remedy}")
    # Compared after a round trip through JSON, which turns tuples into lists.
    stored, now = json_leaves(header.get("fingerprint")), json_leaves(json.loads(json.dumps(fingerprint)))
    differences = [
        f"{name} was {stored.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in dict.fromkeys([*stored, *now])
        if stored.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} belongs to a run of another configuration: {'; '.join(differences)}. Set these fields back to resume that "
            f"run, {remedy}"
        )


def _fields(line: bytes, kind: LogKind[Item]) -> dict[str, Any] | None:
    """The fields of a header, None if the line is not the header of such a log."""
    try:
        header = parse_json(line, "header")
    except UserError:
        return None
    return header if isinstance(header, dict) and header.get("schema") == kind.schema and line.endswith(b"\n") else None
