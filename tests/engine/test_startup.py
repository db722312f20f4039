"""The folder of the compilation cache, whose programs are run: only its user may write to it. The devices of a CPU."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlens_jax.config import ComputeConfig
from rlens_jax.engine.startup import chosen_cpu_devices, start_jax
from rlens_jax.errors import UserError


@pytest.fixture(autouse=True)
def _same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_it_is_made_for_its_user_alone(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        start_jax(compilation_cache=tmp_path / "new" / "compiled")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "compiled").stat().st_mode) == 0o700
    start_jax(compilation_cache=tmp_path / "new" / "compiled")


def test_one_that_others_can_only_read_is_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    start_jax(compilation_cache=tmp_path)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_one_that_others_can_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    (tmp_path / "link").symlink_to("cache")
    for folder in ("cache", "link"):
        with pytest.raises(
            UserError, match=rf"{folder}: other users can put programs .*; run chmod go-w on it, or choose another"
        ):
            start_jax(compilation_cache=tmp_path / folder)


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0o40755, 1, 1, 1, own + 7, 1, 1, 1, 1, 1)))
    with pytest.raises(UserError, match="belongs to another user"):
        start_jax(compilation_cache=tmp_path)


def test_one_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="the compilation cache cannot be created"):
            start_jax(compilation_cache=folder)


@pytest.mark.parametrize(
    ("compute", "model_bytes", "devices"),
    [
        (ComputeConfig(), 10**7, 8),
        (ComputeConfig(), 10**9, 2),  # two copies of 2 GB are a quarter of 16 GB
        (ComputeConfig(), 16 * 10**9, 1),
        (ComputeConfig(cpu_devices=3), 16 * 10**9, 3),
        (ComputeConfig(model_shards=2), 10**7, 1),
        (ComputeConfig(model_shards=2, cpu_devices=4), 10**7, 4),
    ],
)
def test_a_cpu_has_a_device_per_core_if_the_copies_fit(compute: ComputeConfig, model_bytes: int, devices: int) -> None:
    assert chosen_cpu_devices(compute, model_bytes, cores=8, memory=16 * 10**9) == devices


@pytest.mark.parametrize(("flags", "devices"), [("", "3"), ("--xla_force_host_platform_device_count=2", "2")])
def test_a_run_sees_the_devices(flags: str, devices: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from rlens_jax.config import ComputeConfig
from rlens_jax.engine.startup import start
from rlens_jax.hosts.processes import Processes
import jax
start(ComputeConfig(cpu_devices=3), Path({str(tmp_path)!r}), Processes(), Path({str(tmp_path)!r}))
print(jax.device_count())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    assert run.stdout.split()[-1:] == [devices], run.stderr
