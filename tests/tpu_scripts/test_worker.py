"""What a TPU VM would run, run here for real with a stand-in for its Python."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import REPOSITORY, Cloud

FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>called
echo "a line of the log"
[[ $* != *--wait* ]] || until [[ -e go ]]; do sleep 0.05; done
[[ $* != *--fail* ]] || exit "${@: -1}"
"""


@dataclass
class Worker:
    """A TPU VM after its installation: a home folder."""

    home: Path

    def __post_init__(self) -> None:
        (self.home / "rlens_jax" / "venv" / "bin").mkdir(parents=True)
        (self.home / "rlens_jax" / "source").symlink_to(REPOSITORY)
        python = self.home / "rlens_jax" / "venv" / "bin" / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """What ssh would run."""
        environment = os.environ | {"HOME": str(self.home)}
        return subprocess.run(["bash", "-c", command], env=environment, cwd=self.home, text=True, capture_output=True)

    def script(self, words: str) -> "subprocess.CompletedProcess[str]":
        return self.run(f"bash rlens_jax/source/tpu_scripts/lib/on_worker.sh {words}")

    def called(self) -> list[str]:
        """The arguments of every start of the worker's Python."""
        file = self.home / "rlens_jax" / "called"
        return file.read_text().split("\0")[:-1] if file.exists() else []

    def let_go(self) -> None:
        (self.home / "rlens_jax" / "go").touch()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path / "home")


def test_an_installation_can_read_and_write_buckets(worker: Worker) -> None:
    stand_in = worker.home / "python3"
    stand_in.write_text(FAKE_PYTHON)
    stand_in.chmod(0o755)
    done = worker.run("PATH=$HOME:$PATH bash rlens_jax/source/tpu_scripts/lib/on_worker.sh install")
    assert done.returncode == 0, done
    assert worker.called()[-1] == "./source[tpu,gcs]"


def test_arguments_reach_the_run_as_they_were_given(cloud: Cloud, worker: Worker) -> None:
    hard = ["--output", '/mnt/it\'s a "$HOME" `x` * \\ ;&', "--data", "two\nlines", "--empty", ""]
    assert cloud.work("launch.sh", "--", *hard).returncode == 0
    (_, command) = cloud.calls()[0][7].split("--command=", 1)
    assert worker.run(command).returncode == 0
    watched = worker.script("watch rank 100")
    assert watched.returncode == 0, watched
    assert worker.called() == ["-m", "rlens_jax.rank", "--config", "embedded", *hard]


def test_a_run_is_started_once_however_often_it_is_asked_for(worker: Worker) -> None:
    assert worker.script("start a --wait").returncode == 0
    again = worker.script("start a --wait")
    assert (again.returncode, again.stderr[:12]) == (0, "a is running")
    other = worker.script("start b")
    assert (other.returncode, other.stderr[:12]) == (1, "a is running")
    worker.let_go()
    assert worker.script("watch a 100").returncode == 0
    assert worker.called() == ["-m", "rlens_jax.rank", "--wait"]
    assert worker.script("start a").returncode == 0, "what has ended can be started again"
    assert worker.script("watch a 0").returncode == 0
    assert worker.called() == ["-m", "rlens_jax.rank", "--wait", "-m", "rlens_jax.rank"]


def test_watching_ends_with_the_run(worker: Worker) -> None:
    worker.script("start a --fail 2")
    failed = worker.script("watch a 100")
    assert failed.returncode == 3
    assert failed.stdout.startswith("a line of the log\na ended on ")
    assert failed.stdout.endswith("with exit code 2\n")
    missing = worker.script("watch b 100")
    assert (missing.returncode, missing.stderr.startswith("error: there is no run b on ")) == (3, True)


@pytest.mark.parametrize("code", [75, 143])
def test_a_stopped_run_can_go_on(worker: Worker, code: int) -> None:
    worker.script(f"start a --fail {code}")
    stopped = worker.script("watch a 0")
    assert stopped.returncode == 75
    assert stopped.stdout.endswith(f"with exit code {code}\n")


def test_a_killed_run_can_go_on(worker: Worker) -> None:
    worker.script("start a --wait")
    pid = int((worker.home / "rlens_jax" / "a.pid").read_text())
    while not worker.called():
        time.sleep(0.02)
    os.kill(pid, 9)
    worker.let_go()
    killed = worker.script("watch a 100")
    assert (killed.returncode, killed.stdout.splitlines()[-1].endswith("unknown, it was killed")) == (75, True)
