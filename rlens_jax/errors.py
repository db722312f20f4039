"""The error type for bad input, suggestions for unknown names, and foreign text made fit for a terminal."""

import difflib
import unicodedata
from collections.abc import Iterable


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
