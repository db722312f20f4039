"""Every option of every command that takes a path: an address is used, or refused by one line.

The store denies every request, so a command ends with the address as soon as it uses it.
"""

import importlib
import json
import re
from argparse import Action
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rlens_jax.__main__ import COMMANDS
from rlens_jax.commands.options import new_file
from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.data.benchmarks import mixture
from rlens_jax.data.benchmarks.catalogue import BENCHMARKS
from rlens_jax.mirrors import place
from tests.stores.fake_store import FakeStore

A = "gs://bucket/folder/x"
LOCAL = " it must be a local path"
NO_PATHS = {
    *("--revision", "--prompt", "--system", "--joint.budget", "--hosts.coordinator", "--pruning", "--first", "--budgets"),
    *("--layers", "--attention", "--ffn", "--turn", "--tolerance", "--seed"),
}
"""Options with a text that is no path; those with a number, a choice or a list of a run's configuration are left out by form."""
NO_PATH_FORMS = re.compile(r"N|X|K|SHARE|NAME(=SUM)?|MONTH|MINUTES|TOPOLOGY|LIST|true\|false|.*\|.*")
RUN: Mapping[str, Sequence[str]] = {
    "--config": [f"--config={A}.yaml"],
    "--model": [f"--model={A}"],
    "--output": [f"--output={A}"],
    "--data.source": [f"--data={A}.jsonl", "--output={tmp}"],
    "--data.benchmarks": [f"--data.benchmarks={A}", "--data={tmp}/mixture.json", "--output={tmp}"],
    "--data.cache": [f"--data.cache={A}"],
    "--compute.compilation_cache": [f"--compute.compilation_cache={A}", "--output={tmp}"],
}
MODEL, PLAN, JSON = {"--model": [A]}, {"--plan": ["embedded", f"--plan={A}"]}, {"--json": ["embedded", f"--json={A}"]}
SCORED = {"--output": ["embedded", f"--output={A}"], "--data": ["embedded", f"--data={A}.jsonl", "--output={tmp}"]}
PATHS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "rank": RUN | {"--profile": [f"--profile={A}"], "--json": ["--dry-run=v5e:2x2", f"--json={A}"]},
    "plan": {option: [*arguments, "--budget=flops=60%"] for option, arguments in RUN.items()},
    "studies": {option: ["layers", *arguments] for option, arguments in {**RUN, "--ranking": [f"--ranking={A}"]}.items()},
    "evaluate": {"--model": [A, "--data=pages", "--output={tmp}"], **PLAN, **SCORED},
    "compare": {"--model": [A, "--data=pages", "--output={tmp}"], **SCORED, "--methods": [f"--methods={A}", "--output={tmp}"]},
    "generate": {
        "--model": [A, "--prompt=x"],
        "--plan": [*PLAN["--plan"], "--prompt=x"],
        "--image": ["embedded", f"--image={A}", "--prompt=x"],
    },
    "report": {"DIR": [A], "--output": ["{tmp}", f"--output={A}.html"]},
    "cost": MODEL | PLAN | JSON,
    "bench": MODEL | JSON,
    "doctor": MODEL | JSON,
    "convert": {"--model": [A, "{tmp}/new"], "--output": ["embedded", A]},
    "validate": {
        "--model": [A, "--dump={tmp}/new"],
        "--reference": ["embedded", f"--reference={A}"],
        "--dump": ["embedded", f"--dump={A}"],
        "--rankings": ["--rankings", "1,0", A],
        "--plan": ["embedded", "--dump={tmp}/new", f"--plan={A}"],
        "--json": ["embedded", "--reference={tmp}", f"--json={A}"],
        "--markdown": ["embedded", "--reference={tmp}", f"--markdown={A}"],
    },
    "data.benchmarks.mixture": {
        "--data": [f"--data={A}", "--output={tmp}/new.json"],
        "--output": ["--data={tmp}", f"--output={A}.json"],
    },
}
REFUSED = ("--data.cache", "--profile")


def main_of(command: str) -> object:
    return mixture.main if "." in command else importlib.import_module(f"rlens_jax.commands.{command}").main


def takes_text(action: Action) -> bool:
    forms = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    return action.nargs != 0 and action.choices is None and not all(NO_PATH_FORMS.fullmatch(str(form)) for form in forms)


@pytest.mark.parametrize("command", PATHS)
def test_every_option_with_a_path_is_known_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new option is either tried below or listed as one without a path."""

    class ParserError(Exception):
        pass

    def stop(parser: ArgumentParser, arguments: Sequence[str]) -> None:
        raise ParserError(parser)

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    with pytest.raises(ParserError) as stopped:
        main_of(command)([])
    (parser,) = stopped.value.args
    options = {(*action.option_strings, action.metavar)[0] for action in parser._actions if takes_text(action)}
    positional = {"MODEL", "SRC", "DST"}  # the same as --model and --output
    assert options - NO_PATHS - positional == set(PATHS[command])
    assert set(PATHS) == {*COMMANDS, "data.benchmarks.mixture"}


@pytest.mark.parametrize(("command", "option"), [(command, option) for command, options in PATHS.items() for option in options])
def test_an_address_is_used_or_refused(
    command: str, option: str, store: FakeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(BENCHMARKS))
    fields = {"format": mixture.FORMAT, "seed": 0, "md5": {name: "0" * 32}, "validation": {name: ["1"]}, "test": {name: ["2"]}}
    (tmp_path / "mixture.json").write_text(json.dumps(fields))
    store.deny = True
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        run_command(main_of(command), argv=[text.format(tmp=tmp_path) for text in PATHS[command][option]])
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert (stopped.value.code, out) == (2, ""), err
    expected = rf"error: .* is {A}:{LOCAL}" if option in REFUSED else rf"error: {A}\S*: no permission on the store .*"
    assert re.fullmatch(expected, line)
    assert not {path.name for path in tmp_path.iterdir()} - {*before, "cache"}


@pytest.mark.parametrize(
    ("command", "option"),
    [("report", "--output"), ("validate", "--markdown"), *((name, "--json") for name in PATHS if "--json" in PATHS[name])],
)
def test_a_store_that_can_only_be_read_is_refused_for_results(
    command: str, option: str, store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work: the devices are not looked at, and nothing is read but options."""
    store.put("bucket/folder/x", b"{}")
    store.deny_writes = True
    with pytest.raises(SystemExit) as stopped:
        run_command(main_of(command), argv=[text.format(tmp=".") for text in PATHS[command][option]])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    assert re.fullmatch(rf"error: {A}(\.html)?\.trial: no permission on the store .*\n", err)
    store.deny_writes = False
    assert new_file(A) == place(A)
    assert store.names("bucket/") == ["bucket/folder/x"]
