"""The training command: killed and resumed it makes the same model, and what it publishes loads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.demo import train as training

pytestmark = pytest.mark.slow

STEPS, KILLED_AT = 4, 3


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "MICRO_BATCHES": 1,
        "MICRO_BATCH": 2,
        "STEPS": STEPS,
        "HOLD_UNTIL": 3,
        "WARMUP": 1,
        "SAVE_EVERY": 2,
        "LOG_EVERY": 1,
    }.items():
        monkeypatch.setattr(training, name, value)
    made, make = [], training.make_step

    def make_once(*arguments: Any) -> Any:
        """The step of the first training for all, which have equal graphs and optimizers, to compile less."""
        made.append(made[0] if made else make(*arguments))
        return made[-1]

    monkeypatch.setattr(training, "make_step", make_once)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        yield


def test_killed_and_resumed_it_makes_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.train(tmp_path / "whole")
    made = training.batches

    def killed(seed: int, start: int, *arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(made(seed, start, *arguments), start + 1):
            if number == KILLED_AT + 1:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(training, "batches", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path / "killed")
    log = (tmp_path / "killed" / "training_log.jsonl").read_text()
    logged = [json.loads(line)["step"] for line in log.splitlines()]
    assert logged == [1, 2, 3]  # one more than was saved
    assert not (tmp_path / "killed" / "model").exists()
    training.train(tmp_path / "killed")

    whole, resumed = (tmp_path / name / "model" for name in ("whole", "killed"))
    assert (whole / "training_log.jsonl").read_text() == (resumed / "training_log.jsonl").read_text()
    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        assert (array == actual[name]).all(), name
    kind, _ = load_model(resumed, jnp.float32)
    assert kind.config.decoder.num_layers == 12
    assert (resumed / "README.md").read_text().startswith("---\nlicense: apache-2.0")
