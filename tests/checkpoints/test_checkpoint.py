"""Reading model folders: what must be refused, and with which words."""

import json
import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlens_jax.checkpoints.checkpoint import load_model, model_hash, read_model_kind
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from tests.checkpoints import tiny

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save_hf(folder, tiny.model(tiny.fields()), tiny.fields())
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(folder: Path | str, **options) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, jnp.float32, **options)
    return str(error.value)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_model_comes_back(good):
    kind, model = load_model(good, jnp.float32)
    tiny.assert_same(model, tiny.model(tiny.fields()))
    assert kind.model_type == "qwen2_vl"
    assert kind.config.decoder.num_layers == 3
    assert kind.fields == tiny.fields()
    assert read_model_kind(good) == kind


def test_missing_folder_names_its_neighbours(folder):
    assert "modle: no such folder (did you mean 'model'?)" in refusal(folder.with_name("modle"))
    assert "'embedded'" in refusal(folder.parent / "no" / "such")
    assert "did you mean 'embedded'?" in refusal("embeded")


def test_a_file_is_no_folder(folder):
    assert "is a file; name the folder" in refusal(folder / "config.json")


def test_find_model_takes_a_path(folder):
    assert find_model(str(folder)) == folder
    assert find_model(folder) == folder


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)


def test_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    assert "config.json: not valid JSON" in refusal(folder)


@pytest.mark.parametrize("model_type", ["qwen2_vll", "llama", None, ["qwen2_vl"]])
def test_unsupported_family(folder, model_type):
    edit_config(folder, model_type=model_type)
    message = refusal(folder)
    assert f"config.json: model_type {str(model_type)!r} is not supported" in message
    assert "supported are: " in message
    assert ("did you mean 'qwen2_vl'?" in message) == ("qwen2" in str(model_type))


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert "model.safetensors: not a complete safetensors file" in message
    assert "\n" not in message


def test_weights_that_are_no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    assert "model.safetensors: not a complete safetensors file" in refusal(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights (*.safetensors)" in refusal(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refusal(folder)
    assert "all weights are pickled (pytorch_model.bin)" in message
    assert "save the model again as safetensors" in message
    assert not Path("pwned").exists()


def test_missing_and_misspelt_tensor(folder):
    tiny.change(folder, lambda t: t.update({"model.layers.1.input_layernrom.weight": t.pop(NORM)}))
    message = refusal(folder)
    assert "2 problems with the weights" in message
    assert f"model.safetensors: model.layers.1.input_layernrom.weight: not known (did you mean '{NORM}'?)" in message
    assert f"{folder}: {NORM}: missing, expected with shape [30]" in message


def test_tensor_too_many(folder):
    tiny.change(folder, lambda t: t.update({"model.layers.3.input_layernorm.weight": t[NORM]}))
    message = refusal(folder)
    assert "1 problem with the weights" in message
    assert "model.safetensors: model.layers.3.input_layernorm.weight: not known" in message


def test_tensor_of_wrong_shape(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    tiny.change(folder, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert f"model.safetensors: {name}: has shape [30, 17], expected [17, 30]" in refusal(folder)


def test_doubled_tensor_in_two_spellings(folder):
    tiny.change(folder, lambda t: t.update({NORM.replace("model.", "model.language_model."): t[NORM]}))
    message = refusal(folder)
    assert "doubled, it is also in model.safetensors as " in message
    assert NORM in message


def test_doubled_tensor_in_two_shards(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    assert "b.safetensors: lm_head.weight: doubled, it is also in a.safetensors" in refusal(folder)


def test_index_names_a_file_that_is_not_there(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors: no such file, though model.safetensors.index.json names it" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_index_without_file_names(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map must map tensor names to file names" in refusal(folder)


def test_index_beside_a_single_file(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model.safetensors"}}))
    assert load_model(folder, jnp.float32)
    index.write_text(json.dumps({"weight_map": {NORM: "other.safetensors"}}))
    assert "has both" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(folder, value):
    tiny.change(folder, lambda t: t[NORM].__setitem__(3, value))
    assert f"model.safetensors: {NORM}: holds NaN or infinite values" in refusal(folder)
    model = load_model(folder, jnp.float32, check_finite=False)[1]
    assert not np.isfinite(np.asarray(model.decoder.layers.input_norm.scale[...])[1, 3])


def test_dtype_that_is_not_read(folder):
    tiny.change(folder, lambda t: t.update({NORM: t[NORM].astype(np.int8)}))
    assert f"{NORM}: has dtype I8, supported are F32, F16, BF16" in refusal(folder)


def test_float16_and_bfloat16_files_are_read(folder):
    def narrow(tensors: dict) -> None:
        for number, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype([np.float16, ml_dtypes.bfloat16, np.float32][number % 3])

    tiny.change(folder, narrow)
    model = load_model(folder, jnp.float32)[1]
    exact = tiny.model(tiny.fields())
    difference = np.abs(np.asarray(model.decoder.head[...]) - np.asarray(exact.decoder.head[...]))
    assert 0 < difference.max() < 0.02


def test_head_is_required_when_untied(folder):
    tiny.change(folder, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight: missing, expected with shape [23, 30]" in refusal(folder)


def test_a_tied_head_is_used_if_it_differs_from_the_embedding(folder, tmp_path, capsys):
    own = load_model(folder, jnp.float32)[1]
    capsys.readouterr()
    edit_config(folder, tie_word_embeddings=True)
    kind, model = load_model(folder, jnp.float32)
    tiny.assert_same(model, own)
    assert not kind.config.decoder.tied_head
    said = "model.safetensors: lm_head.weight differs from model.embed_tokens.weight, so it is used"
    assert capsys.readouterr().err.count(said) == 1
    converted, back = tmp_path / "converted", tmp_path / "back"
    to_orbax(folder, converted, None, lambda num_bytes: None, name="tiny")
    tiny.assert_same(load_model(converted, jnp.float32)[1], own)
    to_safetensors(converted, back, lambda num_bytes: None)
    assert load_file(back / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_tied_head_needs_one_of_the_two_tensors(folder):
    edit_config(folder, tie_word_embeddings=True)
    tiny.change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    kind, model = load_model(folder, jnp.float32)
    assert kind.config.decoder.tied_head
    assert model.decoder.head is None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        copy = Path(shutil.copytree(folder, folder.parent / name))
        tiny.change(copy, lambda t, name=name: t.pop(name))
        tiny.assert_same(load_model(copy, jnp.float32)[1], model)
    tiny.change(copy, lambda t: t.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight: missing" in refusal(copy)


def test_rotary_frequencies_are_ignored(folder):
    tiny.change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}))
    load_model(folder, jnp.float32)


def test_hash_follows_weights_and_config(good, folder):
    before = model_hash(good)
    assert len(before) == 64
    assert model_hash(folder) == before
    (folder / "README.md").write_text("not part of the model")
    assert model_hash(folder) == before
    edit_config(folder, rope_theta=101.0)
    changed = model_hash(folder)
    tiny.change(folder, lambda t: t[NORM].__setitem__(0, 1.0))
    assert len({before, changed, model_hash(folder)}) == 3


def test_hash_of_a_missing_file(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        model_hash(folder)
