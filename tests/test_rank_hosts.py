"""A run of several processes has the results of one process, keeps its work if a process dies, and resumes with fewer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlens_jax.hosts.supervisor import LOST

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SMALL = (
    "--data.validation_samples=2",
    "--data.confirmation_samples=0",
    "--joint.budget=null",
    "--data.test_samples=2",
    "--search.position_layers=9",
    "--search.operators=ffn",
    "--report.random_rankings=0",
    "--report.timing_repeats=1",
    "--report.bootstrap_samples=50",
)
RANKINGS = "--report=none"
FOUND = ("rankings", "search")
"""The fields of ranking.json that a run has with its rankings."""


def start(folder: Path, output: Path, more: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlens_jax.rank", f"--output={output}", *SMALL, *more]
    command += [f"--data.cache={folder / 'data'}", f"--compute.compilation_cache={folder / 'compiled'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_all(folder: Path, output: Path, count: int, *more: Sequence[str]) -> list[subprocess.Popen[str]]:
    """`count` processes of one run; `more` are further options of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [f"--hosts.coordinator=localhost:{port}", f"--hosts.num_processes={count}"]
    together += ["--hosts.heartbeat_seconds=10"]
    options = more or ((),) * count
    return [start(folder, output, [*together, f"--hosts.process_id={index}", *options[index]]) for index in range(count)]


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr per process."""
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder of caches, and the result of one process."""
    folder = tmp_path_factory.mktemp("hosts")
    ((code, _, message),) = ends([start(folder, folder / "one", [])])
    assert code == 0, message
    return folder, (folder / "one" / "ranking.json").read_bytes()


def test_three_processes_rank_as_one(alone: tuple[Path, bytes]) -> None:
    folder, expected = alone
    output = folder / "together"
    (code, result, message), *others = ends(start_all(folder, output, 3))
    assert [code, *(other[0] for other in others)] == [0] * 3, message + str(others)
    assert (output / "ranking.json").read_bytes() == expected
    assert "Layers in the order" in result
    assert {other[1:] for other in others} == {("", "")}  # the first speaks for all


@pytest.mark.parametrize("lost", [0, 1])
def test_one_lost_and_resumed_by_one(alone: tuple[Path, bytes], lost: int) -> None:
    """To the rankings: what follows them is evaluated and written in the same way."""
    folder, whole = alone
    output = folder / f"{lost} lost"
    journal = output / "journal.jsonl"
    processes = start_all(folder, output, 2, [RANKINGS], [RANKINGS])
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.01)
    began = time.monotonic()
    # The parent, and with it the worker that it guards.
    killed = processes.pop(lost)
    killed.send_signal(signal.SIGKILL)
    ((code, _, message),) = ends(processes)
    assert time.monotonic() - began < 60
    killed.communicate()
    assert code == LOST
    assert f"process {lost} of 2 was lost" in message.splitlines()[-1]
    kept = journal.read_bytes()
    ((code, _, message),) = ends([start(folder, output, [RANKINGS])])
    assert code == 0, message
    assert journal.read_bytes().startswith(kept)
    expected, resumed = json.loads(whole), json.loads((output / "ranking.json").read_bytes())
    assert [resumed[name] for name in FOUND] == [expected[name] for name in FOUND]


def test_hosts_with_different_configurations(alone: tuple[Path, bytes]) -> None:
    folder, _ = alone
    ended = ends(start_all(folder, folder / "apart", 2, ["--search.penalty=2"], ["--search.penalty=3"]))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "search.penalty" in ended[0][2]
    assert "Traceback" not in ended[0][2] + ended[1][2]
    assert not (folder / "apart" / "journal.jsonl").exists()
