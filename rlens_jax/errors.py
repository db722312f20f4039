"""The error type for bad input, and suggestions for unknown names."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    Commands print the line to stderr and end with exit code 2, without a traceback.
    """


def suggest(name: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `choices`, or `""` if none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
