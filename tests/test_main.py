"""`rlens COMMAND` and `python -m rlens_jax COMMAND`."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import rlens_jax.commands
from rlens_jax import __main__ as rlens


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rlens_jax", *arguments], capture_output=True, text=True)


def test_every_command_is_listed_with_one_line() -> None:
    listed = run("--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in listed.stdout.splitlines() if line.startswith("  ")}
    modules = {module.name for module in pkgutil.iter_modules(rlens_jax.commands.__path__)}
    assert set(lines) == modules - {"options"}
    assert all(len(text) > 20 and text.endswith((".", ",")) for text in lines.values())
    assert run().stdout == listed.stdout


def test_a_command_gets_its_options_and_its_exit_code() -> None:
    counted = run("cost", "qwen2-vl-7b", "--text=10")
    assert (counted.returncode, counted.stderr) == (0, "")
    assert "qwen2-vl-7b: 28 layers, 10 text" in counted.stdout
    refused = run("cost", "qwen2-vl-7b", "--texts=10")
    assert refused.returncode == 2
    assert "did you mean '--text'" in refused.stderr


def test_a_wrong_command_is_one_line() -> None:
    refused = run("evalute", "embedded")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: there is no command 'evalute' (did you mean 'evaluate'?); see rlens --help\n"


def test_the_installed_script_runs_this_module() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["rlens"]) is rlens.main
