"""Real processes under jax.distributed on this machine: they agree, stop together, and none outlives a lost one for long.

Nothing here may hang: every wait has an end, and what is left is killed.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rlens_jax.hosts.supervisor import LOST
from rlens_jax.plans import Plan
from rlens_jax.search.journal import JOURNAL_NAME, Journal
from tests.hosts.member import IDENTITY

pytestmark = [pytest.mark.processes, pytest.mark.slow]

MEMBER = Path(__file__).parent / "member.py"
LONG = 200
"""Seconds after which a test gives up; a busy machine takes long to import JAX."""


class Pair:
    """Two processes of one run. Each may have further options."""

    def __init__(self, folder, case, *shared, first=(), second=(), **environment):
        self.folder, self.output = folder, folder / "run"
        folder.mkdir(exist_ok=True)
        hosts = (f"--hosts.coordinator=localhost:{free_port()}", "--hosts.num_processes=2")
        self.processes = [
            start(
                self._log(index),
                case,
                f"--output={self.output}",
                *hosts,
                f"--hosts.process_id={index}",
                "--hosts.heartbeat_seconds=10",
                *shared,
                *own,
                **environment,
            )
            for index, own in enumerate((first, second))
        ]

    def _log(self, index):
        return self.folder / f"terminal-{index}"

    def terminal(self, index):
        return self._log(index).read_text()

    def child(self, index):
        return int(re.search(r"pid (\d+)", self.terminal(index))[1])

    def at_work(self):
        """Wait until the journal grows."""
        journal, until = self.output / JOURNAL_NAME, time.monotonic() + LONG
        before = lines(journal)
        while lines(journal) < before + 5:
            assert time.monotonic() < until, self.terminal(0) + self.terminal(1)
            assert all(process.poll() is None for process in self.processes), self.terminal(0)
            time.sleep(0.05)

    def ended(self, within=LONG):
        """Both exit codes, once both have ended."""
        return [process.wait(timeout=within) for process in self.processes]


def start(terminal, *arguments, **environment):
    with terminal.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(MEMBER), *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        )


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def pair(*arguments, **options):
    both = Pair(*arguments, **options)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()


def said(terminal, word):
    return [line.partition(": ")[2] for line in terminal.splitlines() if line.startswith(f"{word}: ")]


def test_all_agree_or_all_report_why(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with pair(
        tmp_path / "pair",
        "agreements",
        f"--data.cache={tmp_path / 'shared'}",
        first=("--search.penalty=3", f"--model={here}"),
        second=("--compute.batch_size=3", f"--model={there}", f"--output={tmp_path / 'elsewhere' / 'run'}"),
    ) as both:
        assert both.ended() == [2, 2]
        refused = [said(both.terminal(index), "refused") for index in (0, 1)]
        fine = [said(both.terminal(index), "fine") for index in (0, 1)]
        first, second = both.terminal(0), both.terminal(1)
    assert refused[0][:4] == refused[1][:4]
    seed, config, missing, everywhere, *_ = refused[0]
    assert seed.endswith("different configurations: search.penalty is 3.0 on process 0, 2.0 on process 1")
    assert "compute.batch_size is 0 on process 0, 3 on process 1" in config
    assert "search.penalty" in config and "output" not in config and "hosts" not in config
    assert missing == f"process 1 of 2, host {socket.gethostname()}: {there}: no such folder"
    assert everywhere == "bad everywhere"
    # Each process names the folder as it knows it.
    assert f"{both.output} is not shared: process 1 of 2 does not see the file that process 0 wrote" in refused[0][4]
    assert "--output" in refused[0][4]
    assert "elsewhere/run is not shared: process 1 of 2" in refused[1][4]
    assert refused[0][5] == refused[1][5]
    assert "cannot write to the run folder" in refused[0][5] and "member.py: File exists" in refused[0][5]
    for folder in (both.output, tmp_path / "shared"):
        assert list(folder.iterdir()) == []  # the token is gone, and nobody crashed
    assert fine[0] == ["[['é', 0], ['é', 1]]", "None", "first"]
    assert fine[1] == ["[['é', 0], ['é', 1]]", "None", "second"]
    assert refused[0][-1] == f"process 0 of 2, host {socket.gethostname()}: bad everywhere"
    for line in ("spoken once", "toy: 1/1 steps", "error: bad everywhere"):
        assert line in first
        assert line not in second
    assert "Traceback" not in first + second
    assert len(first.splitlines()) == 1 + len(refused[0]) + len(fine[0]) + 4  # and not one line by C++


def test_a_process_with_another_number_of_processes_ends_all(tmp_path):
    with pair(tmp_path / "pair", "ranking", second=("--hosts.num_processes=3",)) as both:
        assert both.ended() == [2, 2]
        assert said(both.terminal(0), "error") == [
            "the processes of the run were started with different configurations: "
            "hosts.num_processes is 2 on process 0, 3 on process 1"
        ]
        assert said(both.terminal(1), "error") == []


def test_sigterm_to_one_stops_all_and_the_run_is_resumed_by_one(tmp_path):
    with pair(tmp_path / "pair", "ranking") as both:
        both.at_work()
        both.processes[1].send_signal(signal.SIGTERM)
        os.kill(both.child(1), signal.SIGTERM)  # as SLURM, which tells every process of a step
        assert both.ended() == [143, 143]
        assert "the same command goes on from there" in both.terminal(0)
        assert both.terminal(1).splitlines()[1:] == []
        assert "resumed [0, 0], 2 devices" in both.terminal(0)
    with Journal.open(both.output, IDENTITY) as journal:
        values = [float(journal.outcomes("toy", Plan((step,)), 1)[0]) for step in range(journal.num_outcomes)]
    assert values == list(range(len(values)))
    assert sorted(path.name for path in both.output.iterdir()) == ["journal.jsonl", "journal.lock"]


def test_who_loses_a_process_ends_too_and_says_so_in_one_line(tmp_path):
    with ExitStack() as stack:
        # Side by side, for each waits ten seconds for a heartbeat.
        last, first, full = (
            stack.enter_context(pair(tmp_path / name, "ranking", f"--seed={seed}"))
            for name, seed in (("last", 0), ("first", 0), ("full", 101))
        )
        unserved = stack.enter_context(pair(tmp_path / "unserved", "ranking", JAX_ENABLE_PREEMPTION_SERVICE="false"))
        last.at_work()
        first.at_work()
        unserved.at_work()
        os.kill(last.child(1), signal.SIGKILL)
        unserved.processes[1].send_signal(signal.SIGTERM)  # of which nobody tells the other process
        first.processes[0].kill()  # the parent: its child goes with it
        assert last.ended(within=60) == [LOST, LOST]
        assert first.ended(within=60) == [-signal.SIGKILL, LOST]
        assert full.ended() == [LOST, 2]
        assert unserved.ended(within=60) == [LOST, 143]

        (line,) = said(last.terminal(0), "error")
        assert line.startswith("process 1 of 2 was lost, and this one ended with it; start the same command again")
        (line,) = said(last.terminal(1), "error")
        assert line.startswith("process 1 of 2 was killed (SIGKILL, for example because memory ran out); start the same")
        (line,) = said(first.terminal(1), "error")
        assert line.startswith("process 0 of 2 was lost, and this one ended with it; start the same command again")
        (line,) = said(full.terminal(1), "error")
        assert line == "process 1 of 2: the disk of this one is full"
        (line,) = said(full.terminal(0), "error")
        assert line.startswith("process 1 of 2 was lost")

        assert "JAX's preemption service is off: SIGTERM ends one process at once" in unserved.terminal(0)
        assert said(unserved.terminal(0), "error")[0].startswith("process 1 of 2 was lost")
        assert unserved.terminal(1).endswith(
            "\n\ninterrupted; what is finished is kept, and the same command goes on from there\n"
        )

        for run, index in ((last, 0), (first, 1), (full, 0), (unserved, 0)):
            assert said(run.terminal(index), "error")[0].endswith(f"(its log: {run.output}/process-{index}.log)")
            assert "Terminating process" in (run.output / f"process-{index}.log").read_text()
            for noise in ("Traceback", "Check failure", "Gloo", "coordination_service"):
                assert noise not in run.terminal(index)

        # What was finished is kept, for a run of any number of processes.
        with Journal.open(last.output, IDENTITY) as journal:
            values = [float(journal.outcomes("toy", Plan((step,)), 1)[0]) for step in range(journal.num_outcomes)]
        assert values == list(range(len(values)))
        assert len(values) >= 5


def test_a_process_that_waits_in_vain_says_for_what(tmp_path):
    def first_of_two(name, port, *options):
        hosts = (f"--hosts.coordinator=localhost:{port}", "--hosts.num_processes=2", "--hosts.process_id=0")
        return start(tmp_path / name, "ranking", f"--output={tmp_path / 'run'}", *hosts, *options)

    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        occupied = first_of_two("occupied", taken.getsockname()[1])
        alone = first_of_two("alone", free_port(), "--hosts.wait_seconds=2")
        waiting = first_of_two("waiting", free_port())
        until = time.monotonic() + LONG
        while not (tmp_path / "waiting").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        waiting.send_signal(signal.SIGINT)
        codes = [process.wait(timeout=LONG) for process in (occupied, alone, waiting)]
    assert codes == [2, LOST, 130]
    outputs = [(tmp_path / name).read_text() for name in ("occupied", "alone", "waiting")]
    (line,) = said(outputs[0], "error")
    assert line.startswith("the port of hosts.coordinator is in use on this host")
    (line,) = said(outputs[1], "error")
    assert line.startswith("not all processes of the run joined within hosts.wait_seconds")
    assert outputs[2].endswith("\n\ninterrupted; what is finished is kept, and the same command goes on from there\n")
    assert [len(text.splitlines()) for text in outputs] == [2, 2, 3], outputs  # the pid and the line
