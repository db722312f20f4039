"""Runs a process of a distributed run as a child, and reports in one line why it died.

If a peer is lost, JAX's C++ runtime ends the process with SIGABRT: no Python handler runs, and dozens of C++ lines are printed.
So the command starts itself again as a child. The child's Python writes to the terminal as usual. The output of C++ goes to a
log, which is saved to the run's folder if the child dies. The child dies with its parent.
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
from rlens_jax.errors import UserError
from rlens_jax.files import replace_file
from rlens_jax.quiet import TERMINAL

LOST = os.EX_TEMPFAIL
"""Exit code (75) if a process of the run was lost. The same command, started again, resumes the run."""

PORT_TAKEN = "the port of hosts.coordinator is in use on this host; choose another, on all hosts"

_MEMBER = "rlens_jax: process {} of {}\n"
_AGAIN = "start the same command again on all hosts to resume"


def supervised(folder: Path) -> None:
    """Continue in a child process: returns in the child, while the parent waits for it and exits.

    The child receives SIGTERM and Ctrl-C as SIGTERM, which ends all processes of the run at the same step. A second Ctrl-C
    kills it. The log of a child that died is saved to `folder`.

    The parent's exit code is that of the child (0; 2 bad input; 143 after SIGTERM on any process; 1 an error in this program),
    or 130 after Ctrl-C in the parent, or `LOST` if the child was killed or ended because another process was lost.
    """
    if TERMINAL in os.environ:
        _take_terminal()
    else:
        with tempfile.TemporaryFile() as log:
            sys.exit(_Parent(folder, log).wait())


def mark_joined(index: int, count: int) -> None:
    """Report to the parent that this process has joined the others, with its index."""
    os.write(2, _MEMBER.format(index, count).encode())


class _Parent:
    """The process that starts the child, forwards signals to it and reports how it ended."""

    def __init__(self, folder: Path, log: IO[bytes]):
        self._folder, self._log = folder, log
        self._received: list[tuple[int, float]] = []
        self._child: subprocess.Popen | None = None

    def wait(self) -> int:
        """Start the child, wait for it, and return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        streams = (os.dup(sys.stdout.fileno()), os.dup(sys.stderr.fileno()))
        self._child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, TERMINAL: ",".join(map(str, streams))},
            pass_fds=streams,
            stdin=subprocess.PIPE,  # closes with this process, which ends the child
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent only
        )
        if self._received:
            self._child.kill()
        return self._end(self._child.wait())

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._received.append((number, time.monotonic()))
        if self._child is None:
            return
        interrupts = [moment for received, moment in self._received if received == signal.SIGINT]
        # A terminal and a shell may both send the first interrupt.
        impatient = bool(interrupts) and interrupts[-1] - interrupts[0] > 1
        # Before it has joined the others, the child waits in C++ and handles no signals.
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
        """Save the log to the run's folder, or to a new folder if that cannot be written, and return a note with its path."""
        text = self._text()
        member = _member(text)
        name = f"process-{member[0]}.log" if member else "process.log"
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, text.encode())
        except (OSError, UserError):
            path = Path(tempfile.mkdtemp(prefix="rlens_jax_")) / name
            path.write_text(text)
        return f" (its log: {path})"


def explained(log: str, number: int) -> tuple[str, int]:
    """One line that explains why a child died by the signal `number`, and the exit code; `log` is the output of C++."""
    member = _member(log)
    if member is None and "Failed to add port to server" in log:
        return PORT_TAKEN, BAD_INPUT  # JAX also raises an error, unless it crashes first
    if member is None and "RegisterTask" in log:
        return (
            "not all processes of the run joined within hosts.wait_seconds; start the same command on every host, with the "
            "same hosts.num_processes and hosts.coordinator (its port, on Cloud TPUs 8482, must be open between the hosts)",
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
        cause += ", for example because memory ran out"
    this = f"process {member[0]}{count}" if member else "the process"
    return f"{this} was killed ({cause}); {_AGAIN}", LOST


def _member(log: str) -> tuple[str, str] | None:
    """Index of this process and number of processes, None before it has joined."""
    pattern = re.escape(_MEMBER.strip()).replace(r"\{\}", r"(\d+)")
    match = re.search(pattern, log)
    return (match[1], match[2]) if match else None


def _take_terminal() -> None:
    """In the child: connect Python's streams to the terminal, and end with the parent."""
    out, err = map(int, os.environ.pop(TERMINAL).split(","))
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
