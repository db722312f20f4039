"""`python -m rlens_jax.validate` in this process."""

import pytest

from rlens_jax.commands.validate import main
from rlens_jax.console import run_command

PROGRESS = ("comparing: ", "running PyTorch: ")


def validate(*arguments: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv=[str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refused validation."""
    capsys.readouterr()
    assert validate(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
