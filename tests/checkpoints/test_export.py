"""Folders written by `save_hf` appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from rlens_jax.files import new_folder
from tests.checkpoints import tiny

KILLED = """
import os, signal, sys
from pathlib import Path
from rlens_jax.files import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(tied, tmp_path):
    fields = tiny.fields(tie_word_embeddings=tied)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = tiny.model(fields, seed=3, dtype=dtype)
        folder = tmp_path / jnp.dtype(dtype).name
        save_hf(folder, model, fields, shard_bytes=3000)
        tiny.assert_same(load_model(folder, dtype)[1], model)
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == jnp.dtype(dtype).name
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert ("lm_head.weight" in index["weight_map"]) != tied
        stored = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert index["weight_map"] == stored
        data = sum(array.nbytes for file in folder.glob("*.safetensors") for array in load_file(file).values())
        assert index["metadata"]["total_size"] == data


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        save_hf(tmp_path / "model", tiny.model(tiny.fields()), tiny.fields())
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    assert list((tmp_path / "model").iterdir()) == []


def test_a_model_of_other_sizes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"decoder\.layers"):
        save_hf(tmp_path / "model", tiny.model(tiny.fields()), tiny.fields(num_hidden_layers=4))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "a" / "model") as partial:
            (partial / "config.json").write_text("{}")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_killed_write_leaves_nothing_that_looks_finished(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "model")], env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".model.")
    assert left[0].endswith(".partial")
    with new_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
