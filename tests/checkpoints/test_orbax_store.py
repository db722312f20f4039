"""Our own format: bit for bit, one leaf a layer, and clear about damage."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from safetensors.numpy import load_file

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.checkpoint import load_model, model_hash
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from tests.checkpoints import tiny

FIELDS = tiny.fields(num_hidden_layers=2, torch_dtype="bfloat16")


def convert(source: Path, target: Path) -> None:
    to_orbax(source, target, None, lambda num_bytes: None, name="tiny")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    save_hf(folder, tiny.model(FIELDS, dtype=jnp.bfloat16), FIELDS)
    return folder


@pytest.fixture(scope="module")
def good(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    convert(published, folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, jnp.bfloat16)
    return str(error.value)


def rewrite(folder: Path, edit) -> None:
    """Saves the leaves again after `edit` changed them."""
    leaves = dict(ocp.load(folder / "orbax"))
    edit(leaves)
    shutil.rmtree(folder / "orbax")
    ocp.save(folder / "orbax", leaves)


def test_comes_back_bit_for_bit(good):
    kind, model = load_model(good, jnp.bfloat16)
    tiny.assert_same(model, tiny.model(FIELDS, dtype=jnp.bfloat16))
    assert kind.fields == FIELDS == json.loads((good / "config.json").read_text())


def test_wider_dtype_keeps_the_values(good):
    model = load_model(good, jnp.float32)[1]
    narrow = tiny.model(FIELDS, dtype=jnp.bfloat16)
    assert model.decoder.head.dtype == jnp.float32
    np.testing.assert_array_equal(model.decoder.head[...], narrow.decoder.head[...].astype(jnp.float32))


def test_one_leaf_a_layer(good):
    leaves = ocp.metadata(good / "orbax").metadata
    assert tuple(leaves["decoder.layers.1.attention.q_proj.kernel"].shape) == (30, 3, 10)
    assert tuple(leaves["decoder.embedding"].shape) == (23, 30)
    assert not any(name.startswith("decoder.layers.attention") for name in leaves)


def test_an_existing_folder_is_left_alone(published, folder):
    before = model_hash(folder)
    with pytest.raises(UserError, match="exists already"):
        convert(published, folder)
    assert model_hash(folder) == before


def test_all_that_does_not_fit_is_told_at_once(folder):
    def edit(leaves: dict) -> None:
        leaves["decoder.layers.1.input_norm.scael"] = leaves.pop("decoder.layers.1.input_norm.scale")
        leaves["decoder.norm.scale"] = leaves["decoder.norm.scale"][:-1]

    rewrite(folder, edit)
    message = refusal(folder)
    assert "3 problems with the weights" in message
    known = "did you mean 'decoder.layers.1.input_norm.scale'?"
    assert f"orbax: decoder.layers.1.input_norm.scael: not known ({known})" in message
    assert "orbax: decoder.norm.scale: has shape [29], expected [30]" in message
    assert "orbax: decoder.layers.1.input_norm.scale: missing" in message


def test_leaves_that_are_no_numbers(folder):
    def edit(leaves: dict) -> None:
        leaves["decoder.layers.1.input_norm.scale"][3] = np.nan

    rewrite(folder, edit)
    assert "orbax: decoder.layers.1.input_norm.scale: holds NaN or infinite values" in refusal(folder)


def test_damaged_metadata(folder):
    (folder / "orbax" / "state" / "_METADATA").write_text("{")
    assert f"{folder / 'orbax'}: damaged or not a complete Orbax checkpoint" in refusal(folder)


def test_empty_store(folder):
    shutil.rmtree(folder / "orbax")
    (folder / "orbax").mkdir()
    assert f"{folder / 'orbax'}: damaged or not a complete Orbax checkpoint" in refusal(folder)


def test_hash_follows_the_store(good, folder):
    assert model_hash(folder) == model_hash(good)
    file = next(path for path in orbax_store.files(folder) if path.name == "manifest.ocdbt")
    file.write_bytes(file.read_bytes() + b"x")
    assert model_hash(folder) != model_hash(good)


@pytest.mark.parametrize("name", ["model", "x[v1]y", "a*c"])
def test_a_folder_may_have_any_name_and_be_given_relative(name, published, tmp_path, monkeypatch):
    (tmp_path / "abc").mkdir()
    monkeypatch.chdir(tmp_path)
    convert(published, Path(name))
    tiny.assert_same(load_model(name, jnp.bfloat16)[1], tiny.model(FIELDS, dtype=jnp.bfloat16))
    to_safetensors(Path(name), Path("back"), lambda num_bytes: None)
    assert load_file("back/model.safetensors").keys() == load_file(published / "model.safetensors").keys()
