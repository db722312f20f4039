"""The line and exit code for a dead child. test_processes.py tests them with real processes."""

import signal

import pytest

from rlens_jax.console import BAD_INPUT
from rlens_jax.hosts.supervisor import LOST, explained

JOINED = "rlens_jax: process 2 of 16\n"
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}The tasks have crashed."


@pytest.mark.parametrize(
    ("log", "number", "line", "code"),
    [
        (JOINED + SILENT.format("1\n"), signal.SIGABRT, "process 1 of 16 was lost", LOST),
        (JOINED + SILENT.format("11\n12\n"), signal.SIGABRT, "processes 11, 12 of 16 were lost", LOST),
        (JOINED + "leader task was preempted/died/", signal.SIGABRT, "process 0 of 16 was lost", LOST),
        (JOINED + "the JAX distributed service detected fatal errors.", signal.SIGABRT, "another process of 16 was lost", LOST),
        (JOINED, signal.SIGSEGV, "process 2 of 16 was killed (SIGSEGV)", LOST),
        ("", signal.SIGKILL, "the process was killed (SIGKILL, for example because memory ran out)", LOST),
        ("Deadline Exceeded\nRPC: /RegisterTask", signal.SIGABRT, "not all processes of the run joined", LOST),
        ("Failed to add port to server", signal.SIGSEGV, "the port of hosts.coordinator is in use", BAD_INPUT),
    ],
)
def test_a_death_is_explained_in_one_line(log, number, line, code):
    message, exit_code = explained(log, number)
    assert message.startswith(line)
    assert "\n" not in message
    assert exit_code == code
    assert code == BAD_INPUT or "start the same command" in message
