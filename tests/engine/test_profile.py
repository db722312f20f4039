"""Where the time of a run goes."""

import json
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import pallas_call

from rlens_jax.engine import profile
from rlens_jax.engine.arithmetic import fixed_flops
from rlens_jax.engine.profile import PARTS, Profile, part, profiled, program_shape
from rlens_jax.errors import UserError
from rlens_jax.files import check_schema

pytestmark = pytest.mark.usefixtures("one_device")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = time.perf_counter()  # the clock of the profile begins with it
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_parts_exclude_each_other_and_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, clock = jnp.zeros(3), Clock(monkeypatch)
    with profiled(tmp_path, ""):
        with part("data"):
            clock.wait(5)
            with part("load"):
                clock.wait(2)
        for name in ("base states", "candidates"):
            with part(name):
                profile.run("layers", (x,), lambda: clock.wait(3))
        profile.run("layers", (x,), lambda: clock.wait(1))
        profile.run("outcome", (), lambda: clock.wait(0.5))
        clock.wait(7)
    fields = json.loads((tmp_path / "profile.json").read_text())
    check_schema(fields, Path(profile.__file__).with_name("profile.schema.json"), tmp_path / "profile.json")
    found = {name: round(seconds, 1) for name, seconds in fields["seconds"].items() if seconds}
    assert found == {"data": 5, "load": 2, "base states": 3, "candidates": 4, "outcomes": 0.5, "host": 7}
    assert list(fields["seconds"]) == list(PARTS)


def test_compilations_are_counted_by_program_and_shape(tmp_path: Path) -> None:
    """Once per shape, and not as time of the part in which they happen."""
    function = jax.jit(lambda x: jnp.sort(x) @ x)
    with profiled(tmp_path, ""):
        for size in (5, 5, 6):
            x = jnp.zeros(size)
            profile.run("layers", (x,), lambda x=x: function(x))
    fields = json.loads((tmp_path / "profile.json").read_text())
    found = {(item["program"], *item["shape"]): item["compilations"] for item in fields["programs"]}
    assert found["layers", 5] == found["layers", 6] == 1
    calls = {tuple(item["shape"]): item["calls"] for item in fields["programs"] if item["program"] == "layers"}
    assert calls == {(5,): 2, (6,): 1}
    assert fields["seconds"]["compile"] > 0.99 * sum(item["seconds"] for item in fields["programs"])


def test_the_rate_of_a_program_is_of_a_call_that_compiled_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that depends on data, of one that was called once, and of two programs of one name, there is none."""
    clock = Clock(monkeypatch)
    calls = {"encode": [(1, 12), (3, 12), (2, 12)], "layers": [(1, None)] * 2, "outcome": [(2, 4)], "prefill": [(1, 4), (1, 6)]}
    with profiled(tmp_path, ""):
        for name, times in calls.items():
            for seconds, flops in times:
                profile.run(name, (), lambda seconds=seconds: clock.wait(seconds), lambda flops=flops: flops)
    programs = json.loads((tmp_path / "profile.json").read_text())["programs"]
    found = {item["program"]: (item["flops"], item["flops_per_second"]) for item in programs}
    assert found == {"encode": (12, pytest.approx(6)), "layers": (None, None), "outcome": (4, None), "prefill": (None, None)}


def test_arithmetic_of_loops_and_of_what_depends_on_data() -> None:
    x, kernel = jnp.zeros((3, 4)), jnp.zeros((5, 2, 3, 3))
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
    for function, expected in (
        (lambda n: x @ x.T, 2 * 3 * 4 * 3),
        (lambda n: jax.lax.fori_loop(0, 10, lambda _, y: jax.jit(jnp.dot)(y, x.T @ x), x), 10 * 2 * (4 * 3 * 4 + 3 * 4 * 4)),
        (lambda n: jax.lax.fori_loop(0, n, lambda _, y: y @ (x.T @ x), x), None),
        (lambda n: jax.lax.fori_loop(0, n, lambda _, y: y + 1, x) @ x.T, 72),
        (lambda n: jax.lax.cond(n > 0, lambda: x @ x.T, lambda: jnp.zeros((3, 3))), None),
        (lambda n: jax.lax.cond(n > 0, lambda: x @ x.T, lambda: 2 * (x @ x.T)), 72),
        (lambda n: conv(jnp.zeros((1, 2, 8, 8)), kernel), 2 * (5 * 6 * 6) * (2 * 3 * 3)),
        (lambda n: pallas_call(lambda a, b: None, out_shape=x)(x), None),
    ):
        assert fixed_flops(jax.make_jaxpr(function)(1).jaxpr) == expected


def test_a_few_calls_of_each_program_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first call, which compiles; on request only."""
    traced: list[str] = []
    monkeypatch.setattr(jax.profiler, "trace", lambda folder: traced.append(folder) or nullcontext())
    for traces in (str(tmp_path / "traces"), ""):
        with profiled(tmp_path, traces):
            for name in ("layers", "outcome", *["layers"] * profile.TRACED, "layers", "outcome"):
                profile.run(name, (), lambda: None)
    assert traced == [str(tmp_path / "traces" / name) for name in [*["layers"] * profile.TRACED, "outcome"]]


def test_a_trace_is_written(tmp_path: Path) -> None:
    function, x = jax.jit(lambda x: x + 1), jnp.zeros(3)
    with profiled(tmp_path, str(tmp_path / "traces")):
        for _ in range(2):
            profile.run("layers", (x,), lambda: function(x))
    assert list((tmp_path / "traces" / "layers").rglob("*.xplane.pb"))


def test_a_folder_of_traces_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for traces, complaint in (
        (str(tmp_path / "file"), "--profile: cannot write to .*file"),
        ("gs://bucket/traces", "a local path"),
    ):
        with pytest.raises(UserError, match=complaint), profiled(tmp_path, traces):
            pass


def test_a_compilation_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = Clock(monkeypatch), Profile()
    clock.wait(3)
    taken.on_event("/jax/core/compile/jaxpr_trace_duration", 1.0, fun_name="inner")
    clock.wait(1)
    taken.on_event("/jax/core/compile/jaxpr_trace_duration", 3.0, fun_name="outer")
    taken.on_event("/jax/other", 3.0)
    assert taken.seconds["compile"] == 3.0


def test_compilations_side_by_side_are_not_added_up() -> None:
    taken = Profile()
    event = "/jax/core/compile/backend_compile_duration"
    threads = [threading.Thread(target=taken.on_event, args=(event, 50.0), kwargs={"fun_name": "jit(layers)"}) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert taken.seconds["compile"] == 0
    (program,) = taken.fields()["programs"]
    assert (program["program"], program["compilations"], program["seconds"]) == ("jit(layers)", 2, 100.0)


def test_the_shape_of_a_program_over_prompts_is_its_rows_and_slots() -> None:
    layout = SimpleNamespace(num_text=jnp.zeros(4), bucket=SimpleNamespace(text=32, visual=128))
    assert program_shape((jnp.zeros((9, 9)), SimpleNamespace(layout=layout))) == (4, 32, 128)
    assert program_shape(({"a": jnp.zeros((2, 3))},)) == (2, 3)
    assert program_shape(()) == ()


def test_without_a_profile_nothing_is_waited_for_or_written(tmp_path: Path) -> None:
    for folder, traces in ((None, str(tmp_path)), (tmp_path, None)):
        with profiled(folder, traces), part("data"):
            assert profile.run("layers", (), lambda: 7) == 7
    assert not list(tmp_path.iterdir())
