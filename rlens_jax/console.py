"""Messages, progress, options and exit codes of the commands.

Progress and messages go to stderr, so that stdout holds only a command's result.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import FrameType, TracebackType
from typing import NoReturn

from tqdm import tqdm

from rlens_jax.errors import UserError, printable, suggest
from rlens_jax.files import shortened
from rlens_jax.forecast import Forecast
from rlens_jax.mirrors import with_addresses
from rlens_jax.quiet import quiet_libraries

RESUMABLE = "interrupted; what is finished is kept, and the same command goes on from there"

SECONDS_BETWEEN_LINES = 5.0
"""Of progress, if stderr is not a terminal."""

_LONGEST_LINE = 1500
BAD_INPUT, INTERRUPTED, PIPE_CLOSED, STOPPED = 2, 130, 141, 143
"""Exit codes: bad input, Ctrl-C, SIGPIPE, SIGTERM; all but the first as shells count a signal (128 + its number)."""


class StopRequested(BaseException):
    """SIGTERM, which most schedulers also send before a preemption: end now, in order."""


def run_command(
    main: Callable[[Sequence[str]], None], *, interrupted: str = RESUMABLE, argv: Sequence[str] | None = None, quiet: bool = True
) -> NoReturn:
    """Run a command and exit: 0 when done, 2 with one line for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    If the reader of stdout has closed it, the exit code is 141 and nothing is said.

    Any other exception is an error in this program and passes through, with its traceback. `main` imports JAX inside its body,
    so that JAX starts quietly and bad input is reported at once.

    Args:
        main: the command; receives the arguments.
        interrupted: the line printed after Ctrl-C and SIGTERM.
        argv: the arguments; by default those of the process.
        quiet: whether to hide what libraries print.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with quiet_libraries() if quiet else nullcontext():
            sys.exit(_exit_code(main, sys.argv[1:] if argv is None else argv, interrupted))
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str], interrupted: str) -> int:
    try:
        check_arguments(argv)
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more at its end
        return PIPE_CLOSED
    except UserError as error:
        print(f"error: {_for_terminal(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, StopRequested) as stop:
        print(f"\n{interrupted}", file=sys.stderr)
        return STOPPED if isinstance(stop, StopRequested) else INTERRUPTED
    return 0


def check_arguments(argv: Sequence[str]) -> None:
    """Raise UserError for an argument that is not UTF-8 text; Python keeps such bytes as lone surrogates."""
    for number, argument in enumerate(argv, 1):
        if any("\ud800" <= char <= "\udfff" for char in argument):
            raise UserError(f"argument {number} is not UTF-8 text: {argument}")


def _for_terminal(text: str) -> str:
    """A message with foreign text escaped, overlong lines cut, and addresses for the paths that stand for them."""
    return "\n".join(shortened(line, _LONGEST_LINE) for line in printable(with_addresses(text)).split("\n"))


def show(text: str) -> None:
    """Print the result of a command to stdout, with foreign text escaped, and with what stdout's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"  # None where a test captures it
    print(printable(with_addresses(text)).encode(encoding, "backslashreplace").decode(encoding))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise StopRequested


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that answers bad options with one line and exit code 2, as all bad input."""

    def __init__(self, prog: str, description: str | None, *, add_help: bool = True):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=add_help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]  # never the process's own
        """All options. UserError for an unknown one, with the nearest known option."""
        # Arguments may stand between options.
        options, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            argument = unknown[0]
            if argument.startswith("-"):
                self.error(f"unknown option {argument}{self._nearest(argument.partition('=')[0])}")
            self.error(f"unexpected argument {argument!r}")
        return options

    def _nearest(self, option: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        field = option.lstrip("-").replace("-", "_")
        # An option without its group, such as --probe for --reduction.probe, may be far from it in spelling.
        ungrouped = next((name for name in known if name.rpartition(".")[2] == field), "")
        return suggest(option, known) or suggest(ungrouped, known)


_muted = threading.Event()


def mute() -> None:
    """Print no messages and no progress from now on, on all processes of a run but the first."""
    _muted.set()


def say(line: str) -> None:
    """Print a line to the terminal, above the progress bar if there is one."""
    if not _muted.is_set():
        tqdm.write(_for_terminal(line), file=sys.stderr)


class Progress:
    """Context manager that shows progress: a bar if stderr is a terminal, else a line every `SECONDS_BETWEEN_LINES`.

    Args:
        label: what is done.
        total: items to do, as far as is known: it grows with what is done.
        unit: their name, in the plural.
        forecast: knows the items of all phases of the command, of this one under `label`, and counts them; then the time left
            of the whole command is shown, too.
    """

    def __init__(self, label: str, total: int, unit: str, forecast: Forecast | None = None):
        self._name, self._label, self._total, self._unit = label, printable(label), total, unit
        self._before = self._done = 0
        self._stream = sys.stderr
        self._forecast = forecast
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        if self._forecast is not None:
            self._forecast.begin()
        if self._stream.isatty() and not _muted.is_set():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit}{postfix}"
            self._bar = tqdm(
                desc=self._label, total=self._total, unit=f" {self._unit}", file=self._stream, dynamic_ncols=True, bar_format=form
            )
        else:
            self._print_line()
        return self

    def advance(self, items: int = 1, *, resumed: bool = False) -> None:
        """Count `items` more as done. Items `resumed` from an earlier run do not count for the rate."""
        self._done += items
        self._total = max(self._total, self._done)
        self._before += items if resumed else 0
        if self._forecast is not None:
            self._forecast.advance(self._name, items, resumed=resumed)
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(self._time().removeprefix(", "), refresh=False)
            self._bar.update(items)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._print_line()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line()
        if self._forecast is not None:
            self._forecast.end(self._name)

    def _print_line(self) -> None:
        if not _muted.is_set():
            self._last_line = time.monotonic()
            print(f"{self._label}: {self._done}/{self._total} {self._unit}{self._time()}", file=self._stream, flush=True)

    def _time(self) -> str:
        """The time left, or the rate and the time taken."""
        seconds, counted = time.monotonic() - self._start, self._done - self._before
        if not (counted > 0 and seconds > 0):
            return ""
        rate = counted / seconds
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        if self._done >= self._total:
            return f", {speed}, took {_duration(seconds)}"
        left = None if self._forecast is None else self._forecast.seconds(self._name)
        if left is None:
            return f", {speed}, {_duration((self._total - self._done) / rate)} left"
        return f", {_duration(left[0])} left, {_duration(left[1])} for the whole run"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
