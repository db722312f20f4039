"""Where the time of a run goes."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rlens_jax.engine import profile
from rlens_jax.engine.profile import PARTS, Profile, part, profiled, program_shape
from rlens_jax.files import check_schema

pytestmark = pytest.mark.usefixtures("one_device")


def test_parts_exclude_each_other_and_add_up(tmp_path: Path) -> None:
    began = time.perf_counter()
    with profiled(tmp_path):
        with part("data"):
            time.sleep(0.05)
            with part("load"):
                time.sleep(0.02)
        for _ in range(2):
            with part("base states"):
                profile.run("layers", (jnp.zeros(3),), lambda: time.sleep(0.03))
        profile.run("outcome", (), lambda: time.sleep(0.01))
    whole = time.perf_counter() - began
    fields = json.loads((tmp_path / "profile.json").read_text())
    check_schema(fields, Path(profile.__file__).with_name("profile.schema.json"), tmp_path / "profile.json")
    seconds = fields["seconds"]
    assert list(seconds) == list(PARTS)
    for name, least in (("data", 0.05), ("load", 0.02), ("base states", 0.06), ("outcomes", 0.01)):
        assert least <= seconds[name] < least + 0.04, name
    assert seconds["candidates"] == 0
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.05)


def test_compilations_are_counted_by_program_and_shape(tmp_path: Path) -> None:
    """Once per shape, and not as time of the part in which they happen."""
    function = jax.jit(lambda x: jnp.sort(x) @ x)
    with profiled(tmp_path):
        for size in (5, 5, 6):
            x = jnp.zeros(size)
            profile.run("layers", (x,), lambda x=x: function(x))
    fields = json.loads((tmp_path / "profile.json").read_text())
    found = {(item["program"], *item["shape"]): item["compilations"] for item in fields["programs"]}
    assert found["layers", 5] == found["layers", 6] == 1
    assert fields["seconds"]["compile"] > 0.99 * sum(item["seconds"] for item in fields["programs"])
    assert fields["seconds"]["compile"] > fields["seconds"]["candidates"]


def test_a_compilation_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    taken = Profile()
    now = 103.0
    taken.on_event("/jax/core/compile/jaxpr_trace_duration", 1.0, fun_name="inner")
    now = 104.0
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
    with profiled(None), part("data"):
        assert profile.run("layers", (), lambda: 7) == 7
    assert not list(tmp_path.iterdir())
