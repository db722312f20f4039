"""The options of a dry run on the command line of `rlens_jax.rank`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlens_jax.dry_run.topology import Slice, find_slice
from rlens_jax.errors import UserError

OPTIONS = {
    "--dry-run": "of a TPU topology such as v5e:16x16. Nothing runs, but the run's programs are compiled for that slice, on a "
    "machine without one: do they fit, what do they cost, about how long would the run take. The model's folder needs to hold "
    "no more than its config.json.",
    "--json": "file to which a dry run writes all that it found out.",
    "--all-buckets": "a dry run compiles programs of all sizes, and not only of the largest.",
}
"""What each option does."""
_WITH_VALUE = ("--dry-run", "--json")


@dataclass(frozen=True)
class Request:
    """What is asked of a dry run."""

    target: Slice
    all_buckets: bool
    json_file: Path | None


def take_request(arguments: Sequence[str]) -> tuple[Request | None, list[str]]:
    """The request for a dry run, or None, and the arguments that are left.

    Raises:
        UserError: an option lacks its value or its --dry-run, there is no such topology, or no folder for the file.
    """
    given: dict[str, str] = {}
    left: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name not in OPTIONS:
            left.append(argument)
        elif name not in _WITH_VALUE:
            if equals:
                raise UserError(f"option {name} takes no value")
            given[name] = ""
        else:
            if not equals and not rest:
                raise UserError(f"option {name} needs a value")
            given[name] = value if equals else rest.pop(0)
    if not given:
        return None, left
    if "--dry-run" not in given:
        raise UserError(f"{next(iter(given))} goes with --dry-run TOPOLOGY")
    target = find_slice(given["--dry-run"])
    file = Path(given["--json"]) if "--json" in given else None
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}: the folder {file.parent} does not exist")
    return Request(target, "--all-buckets" in given, file), left
