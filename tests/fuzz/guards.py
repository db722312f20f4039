"""What must not happen while a malformed input is read: a traceback, a hang, a write elsewhere, a half-written output."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rlens_jax.errors import UserError

SECONDS = 20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.symlink": (1, 2),
    "os.link": (1, 3),
    "os.truncate": (0, None),
}
"""Events that change a folder, and which of their arguments are the path and the descriptor of the folder that it is in."""


class HangError(BaseException):
    """A case took longer than `SECONDS`."""


class WrongTreatmentError(Exception):
    """What a case must not do."""


class WriteWatch:
    """Records Python's writes outside of some folders. An audit hook cannot be removed, so there is one, switched on and off."""

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] | None = None
        self.found: list[str] = []
        sys.addaudithook(self._heard)

    @contextmanager
    def only(self, *folders: Path) -> Iterator[None]:
        """Record writes outside of `folders` while the context is open."""
        self.found = []
        self._allowed = ("/dev/", *(str(folder.resolve()) for folder in folders))
        try:
            yield
        finally:
            self._allowed = None

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        inside = -1
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            place, folder = _CHANGES[event]
            path, inside = arguments[place], -1 if folder is None else arguments[folder]
        else:
            return
        if isinstance(path, int | type(None)):
            return
        allowed, self._allowed = self._allowed, None
        above = Path(f"/proc/self/fd/{inside}").readlink() if inside >= 0 else Path()
        real = os.path.realpath(above / os.fsdecode(path))
        nameless = event == "open" and Path(real).is_dir()  # a temporary file that is in no folder
        self._allowed = allowed
        if not nameless and not real.startswith(allowed) and "__pycache__" not in real:
            self.found.append(f"{event} {real}")


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise `HangError` after `SECONDS`; code that Python cannot interrupt ends the process a little later, with its stack."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def outcome(run: Callable[[], Any]) -> tuple[str | None, Any]:
    """The refusal of an input in one line, or None and the result. Everything else is a `WrongTreatmentError`.

    The console cuts a long line.
    """
    try:
        with time_limit():
            return None, run()
    except UserError as error:
        line = str(error)
        if not line.strip() or (len(line.splitlines()) > 1 and "problem" not in line):
            raise WrongTreatmentError(f"not one line: {line[:300]!r}") from error
        return line, None
    except HangError:
        raise WrongTreatmentError(f"no end after {SECONDS} s") from None
    except WrongTreatmentError:
        raise
    except (SystemExit, KeyboardInterrupt) as error:
        raise WrongTreatmentError(f"{type(error).__name__}") from error
    except BaseException as error:
        raise WrongTreatmentError(f"{type(error).__name__}: {str(error)[:300]}") from error
