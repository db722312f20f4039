"""The small parent of a run's process: it outlives what kills the process, and says it in one line.

A process whose peer is lost is ended by JAX's C++ runtime (SIGABRT): no handler in Python runs, and dozens of C++ lines
are left. So the command starts itself again as a child. The child's Python writes to the terminal as ever; what C++
writes is kept in a log, which is put into the run's folder when the child dies. The child dies with its parent.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from rlens_jax.console import BAD_INPUT, INTERRUPTED, RESUMABLE, STOPPED

LOST = os.EX_TEMPFAIL
"""Exit code (75) when a process of the run was lost: the same command, started again, goes on."""

PORT_TAKEN = "the port of hosts.coordinator is in use on this host; name another, on all hosts"

_TERMINAL = "RLENS_JAX_TERMINAL"
_MEMBER = "rlens_jax: process {} of {}\n"
_AGAIN = "start the same command again on all hosts to resume"


def supervised(folder: Path) -> None:
    """Go on in a child process: returns in the child; the parent waits for it and exits.

    SIGTERM and Ctrl-C reach the child as SIGTERM, which ends all processes of the run at an agreed point; Ctrl-C once
    more kills it.

    The parent's exit code is that of the child (0, 2 bad input, 143 after SIGTERM on any process, 1 our mistake), or
    130 after Ctrl-C here, or `LOST` when the child was killed or ended because another process was lost.

    Args:
        folder: the run's folder, for the log of a child that died.
    """
    if _TERMINAL in os.environ:
        _take_terminal()
    else:
        with tempfile.TemporaryFile() as log:
            sys.exit(_Parent(folder, log).wait())


def mark_joined(index: int, count: int) -> None:
    """Tell the parent that this process has joined the others, and as which."""
    os.write(2, _MEMBER.format(index, count).encode())


class _Parent:
    def __init__(self, folder: Path, log: IO[bytes]):
        self._folder, self._log = folder, log
        self._received: list[tuple[int, float]] = []
        self._child: subprocess.Popen | None = None

    def wait(self) -> int:
        """Start the child, wait for it, and say how it ended; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        streams = (os.dup(1), os.dup(2))
        self._child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, _TERMINAL: ",".join(map(str, streams))},
            pass_fds=streams,
            stdin=subprocess.PIPE,  # its end is how the child learns that this process is gone
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in a terminal comes here only
        )
        if self._received:
            self._child.kill()
        return self._end(self._child.wait())

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._received.append((number, time.monotonic()))
        if self._child is None:
            return
        interrupts = [moment for received, moment in self._received if received == signal.SIGINT]
        # A terminal and a shell may both send the first one.
        impatient = bool(interrupts) and interrupts[-1] - interrupts[0] > 1
        # Before it has joined the others, the child waits in C++ and hears nothing.
        joined = _member(self._text()) is not None
        self._child.send_signal(signal.SIGTERM if joined and not impatient else signal.SIGKILL)

    def _end(self, code: int) -> int:
        first = self._received[0][0] if self._received else None
        if first is not None and code in (STOPPED, -signal.SIGTERM, -signal.SIGKILL):
            if code != STOPPED:
                print(f"\n{RESUMABLE}", file=sys.stderr)
            return INTERRUPTED if first == signal.SIGINT else STOPPED
        if code < 0:
            line, code = explained(self._text(), -code)
            print(f"error: {line}{self._kept() if code == LOST else ''}", file=sys.stderr)
        return code

    def _text(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def _kept(self) -> str:
        """Where the log is now: in the run's folder, or in a new one when that cannot be written."""
        text = self._text()
        member = _member(text)
        name = f"process-{member[0]}.log" if member else "process.log"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / name
            path.write_text(text)
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="rlens_jax_")) / name
            path.write_text(text)
        return f" (its log: {path})"


def explained(log: str, number: int) -> tuple[str, int]:
    """Why a child died by a signal, as one line, and the exit code for it.

    Args:
        log: what C++ wrote.
        number: of the signal.
    """
    member = _member(log)
    if member is None and "Failed to add port to server" in log:
        return PORT_TAKEN, BAD_INPUT  # JAX raises an error for it too, when it does not crash first
    if member is None and "RegisterTask" in log:
        return (
            "the processes of the run did not all come within hosts.wait_seconds; start the same command on every "
            "host, with the same hosts.coordinator (reachable from all) and hosts.num_processes",
            LOST,
        )
    count = f" of {member[1]}" if member else ""
    silent = re.search(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)", log)
    if silent:
        indices = re.findall(r"(\d+)\n", silent[1])
        which = f"process {indices[0]}" if len(indices) == 1 else f"processes {', '.join(indices)}"
        was, them = ("was", "it") if len(indices) == 1 else ("were", "them")
        return f"{which}{count} {was} lost, and this one ended with {them}; {_AGAIN}", LOST
    if "leader task was preempted/died" in log:
        return f"process 0{count} was lost, and this one ended with it; {_AGAIN}", LOST
    if "JAX distributed service detected fatal errors" in log:
        return f"another process{count} was lost, and this one ended with it; {_AGAIN}", LOST
    cause = signal.Signals(number).name
    if number == signal.SIGKILL:
        cause += ", as when the memory runs out"
    this = f"process {member[0]}{count}" if member else "the process"
    return f"{this} was killed ({cause}); {_AGAIN}", LOST


def _member(log: str) -> tuple[str, str] | None:
    """This process's number and the number of processes, once it has joined."""
    pattern = re.escape(_MEMBER.strip()).replace(r"\{\}", r"(\d+)")
    found = re.search(pattern, log)
    return (found[1], found[2]) if found else None


def _take_terminal() -> None:
    """In the child: Python's streams back to the terminal, and an end when the parent's pipe ends."""
    out, err = map(int, os.environ.pop(_TERMINAL).split(","))
    for number in (out, err):
        os.set_inheritable(number, False)
    sys.stdout = os.fdopen(out, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stderr = os.fdopen(err, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> NoReturn:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")
