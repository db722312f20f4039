"""Keeps what libraries print off a command's terminal: warnings, logs, progress, and what C and C++ write to descriptor 2."""

import faulthandler
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
TERMINAL = "RLENS_JAX_TERMINAL"
"""Environment variable with the terminal's descriptors, of a child whose descriptor 2 is a log that its parent reads."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let only this program's own lines reach the terminal; TF_CPP_MIN_LOG_LEVEL=0 shows everything.

    Python's own tracebacks reach the terminal, also if C code ends the process.
    """
    if os.environ.get(LOG_LEVEL) == "0":
        yield
        return
    os.environ.setdefault(LOG_LEVEL, "2")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    logging.captureWarnings(True)
    try:
        if TERMINAL in os.environ or not _is_terminal():
            yield
        else:
            with _apart():
                yield
    finally:
        logging.captureWarnings(False)
        logging.disable(before)


def _is_terminal() -> bool:
    """Whether Python's stderr is descriptor 2. It is not in a test that captures it."""
    try:
        return sys.stderr.fileno() == 2
    except (AttributeError, io.UnsupportedOperation):
        return False


@contextmanager
def _apart() -> Iterator[None]:
    """Connect Python's stderr to the terminal by a descriptor of its own, and descriptor 2 to nothing."""
    python, copy = sys.stderr, os.dup(2)
    python.flush()
    with open(copy, "w", buffering=1, encoding=python.encoding, errors="backslashreplace") as own:
        sys.stderr = own
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)
        faulthandler.enable(own)
        try:
            yield
        finally:
            faulthandler.disable()
            own.flush()
            os.dup2(copy, 2)
            sys.stderr = python
