"""Append-only logs on remote stores, where nothing can be appended: `journal.jsonl` is the objects in `journal.parts`, joined.

Each flush is an object of its own, `FIRST-LAST`: eight digits each, the numbers of the flushes in it. It is written only if it
does not exist yet, so that two runs never mix. When a log is opened, many parts are joined into one: it is written first, and the
parts that it holds are deleted after.
"""

import re
from pathlib import Path

from rlens_jax import mirrors, stores
from rlens_jax.errors import UserError
from rlens_jax.files import replace_local
from rlens_jax.store_locks import StoreLock, check_free

_NAME = re.compile(r"\d{8}-\d{8}")
_MOST_PARTS = 32
"""More are joined when the log is opened."""


class StoreLog:
    """The parts of a log on a store, and the lock of its folder. Made by `StoreLog.open`."""

    def __init__(self, path: Path, address: str, lock: StoreLock):
        self._path, self._address, self._lock = path, address, lock
        self._content, self._next = b"", 0
        self._names: list[str] = []

    @classmethod
    def open(cls, path: Path, noun: str) -> "StoreLog | None":
        """Lock the folder of a log and make the local file as the store has it; None for a local folder.

        UserError if another process writes the log, or the store cannot be used.
        """
        address = _parts_of(path)
        if address is None:
            return None
        lock = StoreLock(*_lock_of(path, noun))
        try:
            log = cls(path, address, lock)
            log._content, log._names = pull(path)
            log._next = 1 + max((int(name[9:]) for name in log._names), default=-1)
            if len(log._names) > _MOST_PARTS:
                log._join()
        except BaseException:
            lock.release()
            raise
        return log

    def settle(self) -> None:
        """Replace the log on the store, unless it is as the local file: the local file was repaired, begun, or removed."""
        content = self._path.read_bytes() if self._path.exists() else b""
        if content != self._content:
            self._lock.check()
            # From the last to the first: what a kill leaves is the beginning of a log. Only what this run knows is deleted.
            for name in reversed(self._names):
                stores.delete(f"{self._address}/{name}")
            self._content, self._next, self._names = content, 0, []
            if content:
                self.append(content)

    def append(self, lines: bytes) -> None:
        """Write whole lines; they are on the store when this returns."""
        self._lock.check()
        name = f"{self._next:08d}-{self._next:08d}"
        if not stores.put_new(f"{self._address}/{name}", lines):
            raise UserError(f"{self._address}: another run has written to this log meanwhile; wait for it to end")
        self._names.append(name)
        self._next += 1

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def _join(self) -> None:
        joined = f"{0:08d}-{self._next - 1:08d}"
        stores.put(f"{self._address}/{joined}", self._content)
        stores.for_each(stores.delete, [f"{self._address}/{name}" for name in self._names if name != joined])
        self._names = [joined]


def pull(path: Path) -> tuple[bytes, list[str]]:
    """Make the local file of a log as the store has it. Returns its content and the names of its parts, none for a local folder.

    UserError if a part is missing.
    """
    address = _parts_of(path)
    if address is None:
        return b"", []
    known = [item.name for item in stores.listed(address) if _NAME.fullmatch(item.name)]
    names = sorted(known, key=lambda name: (name[:8], -int(name[9:])))
    following, used = 0, []
    for name in names:
        first, last = map(int, name.split("-"))
        if last < following:  # a larger part has it
            continue
        if first != following:
            raise UserError(f"{address}: the part {following:08d} is missing; restore it, or use another folder")
        used.append(name)
        following = last + 1
    contents = stores.for_each(stores.read, [f"{address}/{name}" for name in used])
    content = b"".join(part for part in contents if part is not None)
    if used:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_local(path, content)
    else:
        path.unlink(missing_ok=True)
    return content, names


def check_unused(path: Path, noun: str) -> None:
    """Raise UserError if a process has the log open for writing, on a store; nothing for a local folder."""
    if mirrors.address_of(path) is not None:
        check_free(*_lock_of(path, noun))


def _lock_of(path: Path, noun: str) -> tuple[str, str]:
    folder = mirrors.address_of(path.parent)
    return f"{folder}/{noun}{mirrors.LOCK}", str(folder)


def _parts_of(path: Path) -> str | None:
    return mirrors.address_of(path.with_suffix(mirrors.PARTS))
