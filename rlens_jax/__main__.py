"""`rlens COMMAND`, also `python -m rlens_jax COMMAND`: runs a command, as `python -m rlens_jax.COMMAND` does."""

import importlib
import runpy
import sys
from typing import NoReturn

from rlens_jax.console import BAD_INPUT
from rlens_jax.errors import suggest

COMMANDS = (
    "rank",
    "plan",
    "evaluate",
    "compare",
    "generate",
    "report",
    "studies",
    "cost",
    "bench",
    "doctor",
    "convert",
    "validate",
)


def main() -> NoReturn:
    """Run the command that the process's arguments name; without arguments or with `--help`, list the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: rlens COMMAND [OPTIONS]\n\nRedundancyLens for JAX and TPU. Commands:\n")
        for command in COMMANDS:
            doc = importlib.import_module(f"rlens_jax.commands.{command}").__doc__ or ""
            print(f"  {command:<10}{doc.splitlines()[0]}")
        print("\n`rlens COMMAND --help` explains the options of a command.")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}{suggest(name, COMMANDS)}; see rlens --help", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.argv[1:] = arguments
    runpy.run_module(f"rlens_jax.commands.{name}", run_name="__main__")
    raise AssertionError("a command exits")


if __name__ == "__main__":
    main()
