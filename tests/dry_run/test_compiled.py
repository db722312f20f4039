"""The dry run's reading of programs that XLA really compiled, for 8 simulated devices."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("on_eight_devices.py")
B, T, D, F, M, U = 2, 6, 16, 64 // 4, 2, 8 // 4
"""As in the script, a device's share of the batch, FFN units and kept units."""
DENSE = 2 * B * T * D * F * 2
REDUCED = 2 * B * M * D * F + 2 * B * T * D * U * 2
STATES, SCORES = B * T * D * 4, B * F * 4 * 4
PROGRAMS = ["scanned 5", "scanned 9", "bounded 5", "bounded 9"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_flops_with_trip_counts(found: dict[str, Any], program: str) -> None:
    layers = int(program.split()[1])
    assert found[program]["dense"] == [DENSE, layers * DENSE]
    assert found[program]["reduced"] == [REDUCED, layers * REDUCED]


@pytest.mark.parametrize("program", PROGRAMS)
def test_xla_itself_counts_the_body_once_and_the_larger_branch(found: dict[str, Any], program: str) -> None:
    # Elementwise work is in XLA's count and not in ours.
    assert DENSE <= found[program]["xla"][0] < 1.5 * DENSE


@pytest.mark.parametrize("program", PROGRAMS)
def test_collectives_of_a_layer(found: dict[str, Any], program: str) -> None:
    layers = int(program.split()[1])
    reduce = ["all-reduce", "model", 4, STATES, layers]
    gather = ["all-gather", "model", 4, SCORES, layers]
    assert found[program]["layer"]["dense"] == [reduce]
    assert sorted(found[program]["layer"]["reduced"]) == [gather, reduce]
    assert found[program]["outside"] == 0


def test_traffic_of_a_layer_does_not_grow_with_the_stack(found: dict[str, Any]) -> None:
    few, many = (found[f"bounded {layers}"]["bytes"][1] for layers in (5, 9))
    assert few == many
    weights = 2 * F * D * 4
    assert weights < few < 8 * weights


def test_arguments_are_a_devices_share(found: dict[str, Any]) -> None:
    assert found["scanned 5"]["arguments"] == 5 * 2 * F * D * 4 + STATES + 5
