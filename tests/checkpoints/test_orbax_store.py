"""Our own format: bit for bit, one leaf a layer, and clear about damage."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from safetensors.numpy import load_file

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.checkpoint import load_model, model_hash
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.conversion_record import verify_store
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


@pytest.fixture
def late_errors_ignored(monkeypatch) -> Iterator[None]:
    """TensorStore's threads report further errors of a damaged store to an event loop that Orbax has closed by then."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    time.sleep(0.3)


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


@pytest.mark.usefixtures("late_errors_ignored")
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


def store_files(folder: Path) -> list[Path]:
    return [path for path in orbax_store.files(folder) if path.stat().st_size]


@pytest.mark.usefixtures("late_errors_ignored")
@pytest.mark.parametrize("seed", range(6))
def test_damage_is_found_by_the_checksums_or_has_no_effect(seed, good, folder):
    generator = np.random.default_rng(seed)
    path = generator.choice(np.array(store_files(folder)))
    content = bytearray(path.read_bytes())
    if seed % 2:
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    else:
        content = bytearray(b"{}")
    path.write_bytes(content)
    problem = ""
    try:
        verify_store(folder, orbax_store.Reader(folder))
    except UserError as error:
        problem = str(error)
    if problem:
        assert problem.startswith(str(folder))
    else:
        tiny.assert_same(load_model(folder, jnp.bfloat16)[1], load_model(good, jnp.bfloat16)[1])


def test_changed_weights_are_named_when_verified_and_when_converted_back(folder, tmp_path):
    def edit(leaves: dict) -> None:
        leaves["decoder.norm.scale"][3] += 1

    rewrite(folder, edit)
    assert load_model(folder, jnp.bfloat16)
    complaint = "orbax: decoder.norm.scale: differs from its checksum in conversion.json"
    with pytest.raises(UserError, match=complaint):
        load_model(folder, jnp.bfloat16, verify=True)
    with pytest.raises(UserError, match=complaint):
        to_safetensors(folder, tmp_path / "back", lambda num_bytes: None)
    assert not (tmp_path / "back").exists()


def test_a_leaf_that_is_gone_is_named_when_verified(folder):
    rewrite(folder, lambda leaves: leaves.pop("decoder.norm.scale"))
    with pytest.raises(UserError, match=r"orbax: decoder\.norm\.scale: missing"):
        verify_store(folder, orbax_store.Reader(folder))


def test_a_conversion_without_checksums_stays_loadable(folder, tmp_path, capsys):
    record = json.loads((folder / "conversion.json").read_text())
    del record["leaves"]
    (folder / "conversion.json").write_text(json.dumps(record))
    assert load_model(folder, jnp.bfloat16, verify=True)
    to_safetensors(folder, tmp_path / "back", lambda num_bytes: None)
    assert capsys.readouterr().err.count("was converted without checksums") == 2


def change(item: int, **fields: object):
    """Changes fields of one listed tensor."""

    def edit(record: dict) -> None:
        record["tensors"][item].update(fields)

    return edit


def add_carried(record: dict) -> None:
    """Says that a tensor is in a file that is not there."""
    record["tensors"].append({"name": "y", "file": "model.safetensors", "shape": [1], "dtype": "I64", "num_bytes": 8})
    record["carried"].append({"name": "y", "reason": ""})


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (change(0, file="../evil.safetensors"), "'../evil.safetensors' is not the name of a *.safetensors file in this folder"),
        (change(0, file="/tmp/evil.safetensors"), "'/tmp/evil.safetensors' is not the name of a"),
        (change(0, file="config.json"), "'config.json' is not the name of a"),
        (change(0, file=None), "tensors[0].file: None is not of type 'string'"),
        (change(0, name="x"), "the tensor x is not one of this model"),
        (change(0, shape=[1]), "but the store has bfloat16"),
        (change(0, dtype="F99"), "but the store has bfloat16"),
        (change(0, num_bytes=2), "of 2 bytes, but the store has bfloat16"),
        (change(0, num_bytes=10**15), "but the disk has"),
        (lambda record: record["tensors"].append(record["tensors"][0]), "is there twice"),
        (lambda record: record["tensors"][0].update(file="other.safetensors"), "other.safetensors is none of the files of the"),
        (lambda record: record["tensors"].pop(), "tensors: "),
        (lambda record: record.update(tensors=[]), "tensors: [] should be non-empty"),
        (lambda record: record.update(leaves={"x": "y"}), "leaves.x: 'y' does not match"),
        (lambda record: record["carried"].append({"name": "lm_head.weight", "reason": ""}), "tensors: lm_head.weight is missing"),
        (add_carried, "cannot read"),
    ],
)
def test_a_record_that_names_what_it_must_not_writes_nothing(edit, complaint, folder, tmp_path):
    record = json.loads((folder / "conversion.json").read_text())
    edit(record)
    (folder / "conversion.json").write_text(json.dumps(record))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        to_safetensors(folder, tmp_path / "back", lambda num_bytes: None)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_config_of_other_sizes_than_the_store_is_named_when_converted_back(folder, tmp_path):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": 22}))
    with pytest.raises(UserError, match=r"orbax: decoder\.embedding: has shape \[23, 30\], expected \[22, 30\]"):
        to_safetensors(folder, tmp_path / "back", lambda num_bytes: None)
