"""The Dynamic FFN over a mesh axis; the numbers come out of one process with eight simulated devices."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from rlens_jax.ops.ffn import HEADROOM, shard_capacity
from rlens_jax.plan import Reduction

ROOT = Path(__file__).parents[2]
MANY_DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def findings() -> set[str]:
    """What `sharded_ffn_on_devices.py` found, a line a check: "ok NAME"; anything else fails every test here."""
    script = ROOT / "tests" / "ops" / "sharded_ffn_on_devices.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": MANY_DEVICES, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("case", "shards"),
    [
        *product(["strided", "one shard owns all", "ties across shards"], [1, 2, 4, 8]),
        *product(["random", "imposed"], [1, 4]),
    ],
)
def test_equals_one_device(findings, case, shards):
    assert f"ok {case}, {shards} shards" in findings


def test_a_score_that_is_no_number_is_marked_on_every_shard(findings):
    assert "ok no number" in findings


def test_inside_a_traced_layer_loop(findings):
    assert "ok in a cond in a scan" in findings


def test_no_weights_cross_the_interconnect(findings):
    assert "ok collectives" in findings


def test_one_shard_compiles_no_loop(findings):
    assert "ok no loop" in findings


@pytest.mark.parametrize(
    ("width", "shards", "capacity"),
    [
        (18944, 1, 3789),  # Qwen2-VL-7B
        (18944, 4, 1024),
        (18944, 8, 512),
        (14336, 8, 384),  # InternVL2-8B
        (8960, 2, 1024),
        (64, 4, 4),
        (4, 8, 1),
    ],
)
def test_capacity_is_the_even_share_and_a_little(width, shards, capacity):
    assert shard_capacity(Reduction().kept_units(width), shards, HEADROOM) == capacity
