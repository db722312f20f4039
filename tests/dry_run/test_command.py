"""The command as a person runs it, without the compiler: everything that is answered before it, and when it dies."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rlens_jax.commands.rank import main
from rlens_jax.config import RunConfig
from rlens_jax.dry_run import process
from rlens_jax.dry_run.process import Job, run_job
from rlens_jax.dry_run.topology import find_slice
from rlens_jax.errors import UserError


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "require_compiler", lambda: None)


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let a script stand in for the process that compiles; `send` answers over its pipe."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, signal, sys\n"
        f"pipe = open(int(os.environ[{process.ANSWERS!r}]), 'w')\n"
        "def send(**fields): print(json.dumps(fields), file=pipe, flush=True)\n" + code
    )
    real = sys.executable
    starter = tmp_path / "python"
    starter.write_text(f"#!/bin/sh\nexec {real} {script}\n")
    starter.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(starter))


def dry() -> tuple[str, str]:
    return run_job(Job(RunConfig(), find_slice("v5e:4x4"), all_buckets=False))


@pytest.mark.usefixtures("with_compiler")
def test_answers_noise_and_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = "os.write(1, b'noise'); os.write(2, b'E0000 noise from C++')\n"
    answer = "send(progress='compiling layers'); send(text='the table', json='{}')\n"
    settings = "assert os.environ['TPU_SKIP_MDS_QUERY'] == '1' and os.environ['JAX_PLATFORMS'] == 'cpu'\n"
    child(monkeypatch, tmp_path, settings + noise + answer)
    main(["--dry-run", "v5e:4x4", "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == {}
    printed = capfd.readouterr()
    assert printed.out == "the table\n"
    assert printed.err == "compiling layers\n"


@pytest.mark.usefixtures("with_compiler")
def test_bad_input_that_the_other_process_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, tmp_path, "send(error='x/config.json: no such file')\n")
    with pytest.raises(UserError, match=r"^x/config\.json: no such file$"):
        dry()


@pytest.mark.usefixtures("with_compiler")
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, tmp_path, "send(traceback='Traceback: line 1')\n")
    with pytest.raises(RuntimeError, match="Traceback: line 1"):
        dry()


@pytest.mark.usefixtures("with_compiler")
def test_a_compiler_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = "os.write(2, b'harmless\\nF0000 12:00 tpu.cc:7] Check failed: ok\\n@ 0x1234\\n')\n"
    code = words + "os.kill(os.getpid(), signal.SIGABRT)\n"
    child(monkeypatch, tmp_path, code)
    with pytest.raises(UserError, match=r"^the compiler for TPUs died \(SIGABRT\): F0000 12:00 tpu.cc:7\] Check failed: ok$"):
        dry()


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'rlens-jax\[tpu\]'"):
        main(["--dry-run", "v5e:4x4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "v5e:4x5"], "did you mean v5e:4x"),
        (["--dry-run", "v5e:4x4", "--compute.batchsize", "2"], "unknown option --compute.batchsize"),
        (["--dry-run"], "--dry-run: expected one argument"),
        (["--json", "a.json"], "--json needs --dry-run"),
        (["--all-buckets"], "--all-buckets needs --dry-run"),
        (["--within", "15"], "--within needs --dry-run"),
        (["--profile", "--dry-run", "v5e:4x4"], "--profile needs a run, not a dry run"),
        (["--dry-run", "v5e:4x4", "--within", "0"], "--within must be a number of minutes above 0, not '0'"),
        (["--dry-run", "v5e:4x4", "--within", "soon"], "--within must be a number of minutes above 0, not 'soon'"),
        (["--all-buckets=yes", "--dry-run", "v5e:4x4"], "--all-buckets: ignored explicit argument 'yes'"),
        (["--dry-run", "v5e:4x4", "--json", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
        (["--dryrun", "v5e:4x4"], r"unknown option --dryrun \(did you mean '--dry-run'\?\)"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--dry-run TOPOLOGY compile the run's programs for a TPU slice such as v5e:16x16" in text
