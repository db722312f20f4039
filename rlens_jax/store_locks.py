"""Locks on remote stores: an object that its holder writes again and again while it lives.

A lock is a folder of the store with one object per process that wants it, `NAME.lock/ID`. A process first looks whether another
one lives, then writes its own object, then looks again: of two that start together, at least one sees the other and gives way.
This needs no conditional writes, which not all stores have.

The object of a killed process is recognised at once on the same machine; otherwise, if it does not change for `DEAD_AFTER`
seconds. No clocks of two machines are compared.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlens_jax import stores
from rlens_jax.errors import UserError, printable

BEAT = 15.0
"""Seconds between two writes of a lock's object."""
DEAD_AFTER = 60.0


class StoreLock:
    """A lock that this process holds until `release`, or until it dies.

    Args:
        address: the lock, a folder on a store.
        used: what it protects, for errors.

    Raises:
        UserError: another process holds it, or the store cannot be used.
    """

    def __init__(self, address: str, used: str):
        self._used = used
        dead = check_free(address, used)
        self._object, self._beats = f"{address}/{secrets.token_hex(8)}", 0
        self._released, self._lost = threading.Event(), False
        self._beat()
        try:
            if others := [item for item in _objects(address) if item not in (self._object, *dead)]:
                raise _in_use(used, _holder(others[0]))
            for item in dead:
                stores.delete(item)
        except BaseException:
            stores.delete(self._object)
            raise
        self._thread = threading.Thread(target=self._live, daemon=True, name="lock of a store")
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if another process took this one for dead, as after a long pause, and has the lock now."""
        if self._lost:
            raise UserError(f"{self._used}: another run has taken it over, since this one gave no sign of life")

    def release(self) -> None:
        """Give the lock back. If the store fails, it is taken over later."""
        self._released.set()
        self._thread.join()
        with suppress(UserError):
            stores.delete(self._object)

    def _beat(self) -> None:
        self._beats += 1
        stores.put(self._object, json.dumps({**_this_process(), "beat": self._beats}).encode())

    def _live(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(UserError):  # the next beat may succeed
                if stores.found(self._object) is None:
                    self._lost = True
                    return
                self._beat()


def check_free(address: str, used: str) -> list[str]:
    """Raise UserError if a living process holds a lock. Returns what dead ones left."""
    objects = _objects(address)
    watched = []
    for item in objects:
        holder = _holder(item)
        if holder is None:  # given back meanwhile
            continue
        if holder.get("machine") != _this_process()["machine"]:
            watched.append((item, holder))
        elif _lives(holder):
            raise _in_use(used, holder)
    if watched:
        line = f"{used}: locked by a process on {_host(watched[0][1])}; waiting up to {DEAD_AFTER:.0f} s for its sign of life"
        print(printable(line), file=sys.stderr)  # not `say`: the console imports this module, for addresses
    deadline = time.monotonic() + DEAD_AFTER
    while watched and time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_AFTER / 10))
        for item, holder in list(watched):
            now = _holder(item)
            if now is None:
                watched.remove((item, holder))
            elif now != holder:
                raise _in_use(used, now)
    return objects


def _objects(address: str) -> list[str]:
    return [f"{address}/{item.name}" for item in stores.listed(address)]


def _holder(item: str) -> dict[str, Any] | None:
    """What a lock's object says; None if it is gone."""
    content = stores.read(item)
    if content is None:
        return None
    try:
        fields = json.loads(content)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def _host(holder: dict[str, Any]) -> str:
    """The host of a lock's holder, for messages."""
    return str(holder.get("host"))[:80]


def _this_process() -> dict[str, Any]:
    # A number of a process means something only in one space of numbers, until the machine starts again.
    space = Path("/proc/self/ns/pid").readlink()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = socket.gethostname()
    return {"host": host, "process": os.getpid(), "since": _start(os.getpid()), "machine": f"{host} {boot} {space}"}


def _lives(holder: dict[str, Any]) -> bool:
    process = holder.get("process")
    return isinstance(process, int) and _start(process) == holder.get("since")


def _start(process: int) -> str | None:
    """When a process of this machine started, in ticks since the machine did; None if there is no such process."""
    try:
        # The name of the program, in brackets, may have spaces.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _in_use(used: str, holder: dict[str, Any] | None) -> UserError:
    who = f"process {holder.get('process')} on {_host(holder)}" if holder else "a process that starts now"
    return UserError(f"another run is using {used} ({who}); wait for it to end, or choose another folder")
