"""The examination of devices: what passes on a CPU, and that each part can fail."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rlens_jax.commands import doctor
from rlens_jax.config import FfnPath
from rlens_jax.console import run_command
from rlens_jax.device_checks import examination, ffn_ways, layer_times, machine, numerics
from rlens_jax.engine.timing import Turn
from rlens_jax.errors import UserError
from rlens_jax.files import check_schema, read_json_object
from rlens_jax.flops import DecoderSizes
from rlens_jax.models.decoder import FFN
from rlens_jax.ops.ffn import Units
from rlens_jax.ops.ffn_paths import Ways
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits
from tests.numerics import assert_close

SIZES = DecoderSizes(4, 256, 4, 2, 64, 1024, qkv_bias=True)
SCHEMA = Path(examination.__file__).with_name("doctor.schema.json")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layer, small collectives, and what `start_jax` and `clear_caches` would change for other tests."""
    monkeypatch.setattr(doctor, "find_decoder", lambda model: SIZES)
    monkeypatch.setattr(doctor, "VISUAL_TOKENS", (96,))
    monkeypatch.setattr(machine, "COLLECTIVE_BYTES", 64)
    monkeypatch.setattr("rlens_jax.engine.startup.start_jax", lambda: None)
    monkeypatch.setattr(examination, "check_cache", lambda: machine.CacheCheck("folder", written=True, read=True))


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(doctor.main, argv=arguments)
    return int(stopped.value.code or 0)


def passed(name: str, **changed: Any) -> numerics.Check:
    fields = {"dtype": "float32", "against": "reference", "kernel": None, "interpreted": False, "difference": 0.0}
    return numerics.Check(name, **{**fields, "tolerance": 1e-4, **changed})


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_all_passes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert run(["--json", str(path)]) == 0
    report = read_json_object(path)
    check_schema(report, SCHEMA, path)
    assert all(check["passed"] for check in report["checks"]) and report["fallbacks"] == []
    kernels = {(check["kernel"], check["dtype"]) for check in report["checks"] if check["interpreted"]}
    assert kernels == {("splash", "float32"), ("splash", "bfloat16"), ("fetched ffn", "bfloat16")}
    assert [(each["name"], each["right"]) for each in report["collectives"]] == [("sum", True), ("gather", True)]
    assert report["collectives"][0]["devices"] == len(jax.devices())
    assert [table["visual_tokens"] for table in report["layer"]["tables"]] == [96]
    for table in report["layer"]["tables"]:
        rows = {row["setting"]: row for row in table["times"]}
        assert list(rows) == list(layer_times.SETTINGS) and rows["dense"]["time_saved"] == 0
        assert all(row["deciding_seconds"] == min(row["cpu_seconds"]) for row in table["times"])
        assert rows["freeze"]["flops"] < rows["skip ffn"]["flops"] < rows["ffn"]["flops"] < rows["dense"]["flops"]
    out = capsys.readouterr().out
    assert "FAIL" not in out and "skip attention" in out


def test_the_shipped_values_are_those_of_the_references() -> None:
    shipped = read_json_object(numerics.CPU_VALUES)
    made = numerics.references()
    assert list(shipped) == list(made)
    for name, value in made.items():
        assert_close(numerics.sampled(value), np.array(shipped[name], np.float32), 1e-5)


@pytest.mark.parametrize("broken", ["packed", "splash"])
def test_a_broken_path_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any, layout: Any, attention_range: Any) -> Any:
        if broken == "splash":
            raise ValueError("no such instruction\nfurther lines")
        return q + 1e-3

    kernel = "splash" if broken == "splash" else None
    monkeypatch.setattr(numerics, "_attentions", lambda dtype: iter([(broken, kernel, attend)]))
    monkeypatch.setattr(numerics, "_ffns", lambda weights, dtype: iter([]))
    checks = [check for check in numerics.run_checks() if check.against == "reference"]
    assert checks and not any(check.passed for check in checks)
    if broken == "splash":
        assert checks[0].error == "splash attention, dense (no such instruction)"


def test_a_kernel_that_fails_is_replaced_unless_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [passed("packed"), passed("splash attention", kernel="splash", difference=0.5)]
    kernel, lines = examination._kernel("tpu", checks)
    assert kernel == "packed" and lines == [
        "the kernel splash fails (splash attention: off by 5.0e-01); plain XLA takes its place"
    ]
    assert examination._kernel("tpu", checks[:1]) == ("splash", [])
    assert examination._kernel("gpu", checks[:1]) == ("packed", ["attention by plain XLA, not by cuDNN: cuDNN is not installed"])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    assert examination._kernel("gpu", checks[:1]) == ("cudnn", [])
    wrong = passed("cuDNN attention", kernel="cudnn", difference=None, error="no engine")
    assert examination._kernel("gpu", [wrong]) == ("packed", ["the kernel cudnn fails (no engine); plain XLA takes its place"])
    report = {
        "checks": [{"name": each.name, "kernel": each.kernel, "passed": each.passed} for each in checks],
        "collectives": [{"name": "sum", "right": False}],
        "cache": {"written": True, "read": False},
    }
    assert examination.failures(report, strict=False) == ["collective sum", "compilation cache"]
    assert examination.failures(report, strict=True)[0] == "splash attention"


@pytest.mark.usefixtures("small")
def test_a_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(examination, "run_checks", lambda: [passed("packed attention", difference=None, error="broken")])
    monkeypatch.setattr(examination, "check_collectives", list)
    monkeypatch.setattr(examination, "time_settings", lambda *_: [])
    assert run([]) == doctor.FAILED
    printed = capsys.readouterr()
    assert "FAIL  packed attention, float32: broken" in printed.out and "failed: packed attention" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("path", ["masked", "gathered"])
def test_a_layer_is_timed_with_units_as_a_deployed_model_has_them(path: FfnPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel reads half rows, here another way through them: a reduced FFN has halves, all others have rows."""
    monkeypatch.setattr(ffn_ways, "suited_form", lambda *sizes: "rows" if sizes[-1] == "gathered" else "halves")
    taken = []
    units_of = FFN.units

    def units(ffn: FFN, halved: HalvedStack | None, layer: Any) -> Units:
        taken.append(units_of(ffn, halved, layer))
        return taken[-1]

    monkeypatch.setattr(FFN, "units", units)
    settings = {name: layer_times.SETTINGS[name] for name in ("dense", "both", "skip ffn")}
    monkeypatch.setattr(layer_times, "SETTINGS", settings)
    sizes = DecoderSizes(1, 16, 2, 1, 8, 64, qkv_bias=False)
    (table,) = layer_times.time_settings(sizes, (24,), "float32", "packed", path, time.monotonic() + 60, lambda text: None)
    assert [each.setting for each in table.times] == list(settings), table.left_out
    halved = [name for name, each in zip(settings, taken, strict=True) if isinstance(each, HalvedUnits)]
    assert halved == (["both"] if path == "masked" else [])
    assert {each.ways for each in taken} == {Ways((path,))} and table.ffn_way == path


@pytest.mark.usefixtures("small")
def test_a_kernel_of_the_ffn_that_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    monkeypatch.setattr(examination, "check_collectives", list)
    monkeypatch.setattr(examination, "time_settings", lambda *given: paths.append(given[4]) or [])
    for difference in (0.0, 0.5):
        checks = [passed("fetched FFN", kernel="fetched ffn", difference=difference)]
        monkeypatch.setattr(examination, "run_checks", lambda checks=checks: checks)
        assert run([]) == 0
    assert paths == ["auto", "gathered"]


def test_devices_of_two_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SimpleNamespace(device_kind=kind, platform="gpu") for kind in ("A100", "H100")]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match=r"devices are of different kinds \(A100, H100\)"):
        machine.describe_devices()


def test_timings_that_would_end_too_late_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [layer_times.LayerTime("dense", (Turn(3.0, 1.0), Turn(2.0, 1.5)), 100, None)]
    monkeypatch.setattr(layer_times, "_times", lambda *_: times)
    monkeypatch.setattr(layer_times.time, "monotonic", lambda: 90.0)
    small, large = layer_times.time_settings(SIZES, (100, 200), "float32", "packed", "auto", 92.0, lambda text: None)
    assert small.times == tuple(times) and small.left_out is None
    assert large.times == () and large.left_out is not None and large.left_out.endswith("and 2 s are left")

    def too_large(*_: Any) -> Any:
        raise MemoryError("out of memory")

    monkeypatch.setattr(layer_times, "_times", too_large)
    (table,) = layer_times.time_settings(SIZES, (100,), "float32", "packed", "auto", 92.0, lambda text: None)
    assert table.left_out == "100 visual tokens (out of memory)"


@pytest.mark.processes
@pytest.mark.slow
def test_the_cache_is_written_and_read(tmp_path: Path) -> None:
    code = (
        "import sys, json, dataclasses; from pathlib import Path; from rlens_jax.engine.startup import start_jax;"
        "from rlens_jax.device_checks.machine import check_cache; start_jax(compilation_cache=Path(sys.argv[1]));"
        "print(json.dumps(dataclasses.asdict(check_cache())))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "cache"), "written": True, "read": True}, done.stderr


def test_ways_through_kept_units_are_timed_until_the_deadline() -> None:
    found = ffn_ways.time_ways(
        DecoderSizes(1, 16, 1, 1, 16, 64, qkv_bias=False), (3, 5), (1, 2), "float32", "auto", time.monotonic() + 60
    )
    assert [(each.batch, each.visual_tokens, each.taken) for each in found] == [
        (1, 3, "gathered"),
        (1, 5, "gathered"),
        (2, 3, "gathered"),
        (2, 5, "gathered"),
    ]
    assert all(each.seconds.keys() == {"gathered", "masked"} and min(each.seconds.values()) > 0 for each in found)
    assert ffn_ways.time_ways(SIZES, (3,), (1,), "float32", "auto", time.monotonic() - 1) == []


def test_an_unknown_device_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    program = SimpleNamespace(cost_analysis=lambda: {"bytes accessed": 819e9})
    assert layer_times._predicted(1, program) is None
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")])
    assert layer_times._predicted(1, program) == pytest.approx(1.0)
    assert layer_times._predicted(int(394e12), program) == pytest.approx(2.0)
