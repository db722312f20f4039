import importlib.util

import pytest

from rlens_jax.dry_run import topology
from rlens_jax.dry_run.topology import CHIP_KINDS, find_slice, require_compiler
from rlens_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "devices", "gib"),
    [
        ("v2:2x2", 4, 1, 8, 7.48),
        ("v3:4x4", 16, 4, 32, 15.48),
        ("v4:2x2x2", 8, 2, 8, 30.75),
        ("v5e:1x1", 1, 1, 1, 15.75),
        ("v5e:16x16", 256, 64, 256, 15.75),
        ("v5p:8x8x8", 512, 128, 512, 95.74),
        ("v6e:4x4", 16, 4, 16, 31.25),
    ],
)
def test_slices(name: str, chips: int, hosts: int, devices: int, gib: float) -> None:
    where = find_slice(name)
    assert (where.name, where.chips, where.hosts, where.num_devices) == (name, chips, hosts, devices)
    assert where.memory_limit == pytest.approx(gib * 2**30)


def test_rates_of_a_device() -> None:
    cores, chip = find_slice("v3:4x4"), find_slice("v5p:2x2x2")
    assert cores.flops * 2 == CHIP_KINDS["v3"].flops
    assert (chip.flops, chip.memory_rate) == (459e12, 2765e9)
    assert chip.link_rate == 600e9 / 3  # one of three axes of the torus
    assert find_slice("v5e:4x4").link_rate == 200e9 / 2


@pytest.mark.parametrize(("name", "near"), [("v5e:16x15", "v5e:16x16"), ("v5litepod:4x4", "v5e:4x4"), ("v6:4x4", "v6e:4x4")])
def test_an_unknown_topology_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no TPU topology '{name}'; did you mean .*{near}"):
        find_slice(name)


def test_nothing_near() -> None:
    with pytest.raises(UserError, match="known are v2:2x2, "):
        find_slice("gpu")


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlens-jax\[tpu\]'"):
        require_compiler()
    assert topology.importlib.util is importlib.util
