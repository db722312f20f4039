"""The error type for bad input, the guard around foreign code, suggestions for unknown names, and foreign text made printable."""

import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_REASON = 300


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    Commands print the line to stderr and end with exit code 2, without a traceback.
    """


def printable(text: str) -> str:
    """The text with control characters, invisible format characters and lone surrogates escaped; line ends and tabs stay."""
    return "".join(char.encode("unicode_escape").decode() if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def suggest(name: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `choices`, or `""` if none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """Around calls of a library on the files or images of a user: its errors become one line, `what` and the library's reason.

    Libraries raise errors of any type for broken files, some of them bare ones, and panics of Rust, which are no `Exception`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # Ctrl-C, SIGTERM and the like are nobody's error. The class of Rust's panics cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{what} ({lines[0].strip()[:_LONGEST_REASON]}){advice}") from None
