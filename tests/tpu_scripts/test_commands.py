"""What all scripts have in common: options, help, printing, complaints."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import ACTIVE, ALL_FILES, COMMANDS, FOLDER, NEEDS, REST, Cloud, on_worker


@pytest.mark.parametrize("script", COMMANDS)
def test_print_runs_nothing_and_shows_what_would_run(cloud: Cloud, script: str) -> None:
    # Resuming shows the way after a preemption, so that is what the state is here.
    resumed = [("queued-resources describe", 0, "SUSPENDED")] if script == "resume.sh" else []
    cloud.answer(*resumed, *ACTIVE)
    rest = REST.get(script, ["--", "--output", '/mnt/it\'s a "$HOME" *'] if "launch" in script else [])
    shown = cloud.work(script, "--print", *rest)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert cloud.calls() == []
    subprocess.run(["bash", "-euc", shown.stdout], env=cloud.environment, check=True, capture_output=True)
    printed = cloud.calls()
    assert printed
    (cloud.folder / "calls").unlink()
    cloud.answer(*resumed, *ACTIVE)
    assert cloud.work(script, *rest).returncode == 0
    assert cloud.calls() == printed


@pytest.mark.parametrize("script", COMMANDS)
def test_help_explains_every_option(cloud: Cloud, script: str) -> None:
    result = cloud.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = (FOLDER / script).read_text()
    lists = re.findall(r"^(?:needs|takes|switches)=\((.*)\)$", text, re.MULTILINE)
    for option in {name for names in lists for name in names.split()} | {"print"}:
        assert re.search(rf"^  --{option} +\S", result.stdout, re.MULTILINE), option
    assert f"  tpu_scripts/{script} --project P" in result.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize(("script", "needed"), [(script, name) for script in NEEDS for name in NEEDS[script].split()])
def test_a_missing_setting_is_one_clear_line(cloud: Cloud, script: str, needed: str) -> None:
    result = cloud.work(script, *REST.get(script, []), without=[needed])
    assert result.returncode == 2
    line = f"error: --{needed} is missing (or set RLENS_{needed.upper().replace('-', '_')}); see {script} --help\n"
    assert result.stderr == line
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("create.sh", ["--zome", "x"], "unknown option --zome (did you mean --zone?)"),
        ("create.sh", ["--accelerator=v5e"], "unknown option --accelerator (did you mean --accelerator-type?)"),
        ("delete.sh", ["--force"], "unknown option --force"),
        ("watch.sh", ["N"], "unexpected argument 'N'"),
        ("watch.sh", ["-z"], "unexpected argument '-z'"),
        ("watch.sh", ["--"], "nothing may follow --"),
        ("create.sh", ["--zone", "--spot"], "--zone needs a value"),
        ("create.sh", ["--spot=no"], "--spot takes no value"),
        ("launch.sh", ["--", "--print"], "--print must come before --"),
        ("launch.sh", ["--run", "a b"], "--run must be letters, digits, '.', '_' and '-', not 'a b'"),
        ("launch.sh", ["--config", "no/file.yaml"], "--config: there is no file no/file.yaml"),
        ("resume.sh", ["--config", "file.yml"], "--config: there is no file file.yml"),
        ("gke_launch.sh", ["--workload", "My_run"], "--workload must be up to 40 lower-case letters"),
        ("batch.sh", ["--"], "name the configurations after --, and nothing else"),
        ("batch.sh", ["--", "a", "--seed", "1"], "name the configurations after --, and nothing else"),
        ("batch.sh", ["--", "x/a.yaml", "b", "y/a.yaml"], "several configurations would be called a"),
    ],
)
def test_bad_input_is_one_clear_line(cloud: Cloud, script: str, arguments: list[str], line: str) -> None:
    result = cloud.work(script, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_settings_come_from_the_environment_and_options_win(cloud: Cloud) -> None:
    settings = {f"RLENS_{name}": value for name, value in (("PROJECT", "P"), ("ZONE", "far"), ("NAME", "N"))}
    assert cloud.run("watch.sh", "--zone", "Z", RLENS_RUN="b", **settings).returncode == 0
    assert cloud.calls() == [on_worker("0", "watch b 100")]
    refused = cloud.run("delete.sh", RLENS_YES="no", **settings)
    assert (refused.returncode, len(cloud.calls())) == (2, 1)
    assert refused.stderr.startswith("error: RLENS_YES must be yes or not set")


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: path.name)
def test_scripts_are_short_and_say_what_they_do(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 130
    if path.parent == FOLDER:
        header = lines[1 : lines.index("")]
        assert all(line.startswith("# ") for line in header)
        assert 3 <= len(header) <= 7
        assert "cost" in " ".join(header).lower()
        assert os.access(path, os.X_OK)
        assert lines[0] == "#!/usr/bin/env bash"


def test_every_explained_option_is_taken_by_a_script() -> None:
    explained = set(re.findall(r"\[([a-z-]+)\]=\"", (FOLDER / "lib" / "help.sh").read_text()))
    lists = [re.findall(r"^(?:needs|takes|switches)=\((.*)\)$", (FOLDER / name).read_text(), re.MULTILINE) for name in COMMANDS]
    taken = {option for names in lists for line in names for option in line.split()}
    assert explained == taken | {"print"}
