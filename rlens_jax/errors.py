"""The one error type a user sees, and the "did you mean" that goes with unknown names."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one clear line that says what, where and what to do.

    The commands print it to stderr and end with exit code 2, without a traceback.
    """


def suggest(name: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `choices`, or `""` when none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
