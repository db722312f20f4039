"""A model folder is what its files and links may name, and nothing in it blocks or is taken for what it is not."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from rlens_jax.checkpoints.checkpoint import load_model, read_model_kind
from rlens_jax.checkpoints.containment import inside
from rlens_jax.checkpoints.published import save_hf, weight_files
from rlens_jax.checkpoints.safetensors_file import entries, open_safetensors
from rlens_jax.errors import UserError
from tests.checkpoints import tiny

FIELDS = tiny.fields(num_hidden_layers=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save_hf(folder, tiny.model(FIELDS), FIELDS)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


OUTSIDE = ["../x.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", ".", "", ".x.safetensors", "config.json"]
UNUSABLE = [
    "a\0.safetensors",
    "a\n.safetensors",
    "x" * 300 + ".safetensors",
    "a\\b.safetensors",
    3,
    None,
    ["x"],
    "\ud800.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE + UNUSABLE)
def test_a_name_that_leaves_the_folder_or_cannot_be_a_name_is_refused(name, folder) -> None:
    assert "is not the name of a *.safetensors file in this folder" in refusal(inside, folder, name, folder / "x.json")
    if isinstance(name, str) and "\0" not in name and name.isprintable():
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        assert refusal(weight_files, folder).startswith(f"{index}: ")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["outside", "loop", "nowhere", "fifo"])
def test_links_and_fifos_are_refused_by_name(file, kind, folder) -> None:
    path, outside = folder / file, folder.parent / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"outside": outside, "loop": path, "nowhere": folder / "nothing"}[kind])
    expected = {"outside": f"link out of the model folder, to {outside}", "fifo": "neither a file nor a folder"}
    message = refusal(load_model, folder, jnp.float32)
    assert message.startswith(f"{path}: is ")
    assert expected.get(kind, "link that leads nowhere") in message


def test_a_link_out_of_a_converted_store_is_refused(folder) -> None:
    (folder / "orbax" / "d").mkdir(parents=True)
    (folder / "orbax" / "d" / "x").symlink_to("/etc/passwd")
    assert "link out of the model folder" in refusal(load_model, folder, jnp.float32)


def test_what_is_never_opened_may_be_anything(folder) -> None:
    (folder / ".hidden").symlink_to("/etc/passwd")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "sub" / "fifo")
    assert read_model_kind(folder).model_type == "qwen2_vl"


def test_the_cache_of_the_hub_and_links_within_a_folder_are_read(folder, tmp_path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    assert load_model(snapshot, jnp.float32)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert read_model_kind(linked).model_type == "qwen2_vl"
    (snapshot / "again.json").symlink_to("config.json")
    assert read_model_kind(snapshot).model_type == "qwen2_vl"
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "further.json").symlink_to("../../../elsewhere")
    assert "further.json: is a link out of the model folder" in refusal(read_model_kind, snapshot)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_or_an_empty_file_where_a_file_stands(file, folder) -> None:
    path = folder / file
    path.unlink(missing_ok=True)
    path.mkdir()
    assert str(path) in refusal(load_model, folder, jnp.float32)
    path.rmdir()
    path.touch()
    assert str(path) in refusal(load_model, folder, jnp.float32)


def written(path: Path, header: bytes, data: bytes = bytes(8)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(**changes: object) -> str:
    return json.dumps({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (f'{{"x": {entry()}, "x": {entry()}}}', "field 'x' is given twice"),
        (f'{{"x": {entry()}, "y": {entry()}}}', "y has bytes 0 to 8, after 8"),
        (f'{{"x": {entry(data_offsets=[0, 80])}}}', "x has bytes 0 to 80, after 0"),
        (f'{{"x": {entry(data_offsets=[8, 0])}}}', "x has bytes 8 to 0, after 0"),
        (f'{{"x": {entry(data_offsets=[-8, 0])}}}', "other data_offsets, shape or dtype"),
        (f'{{"x": {entry(data_offsets=[0, 8, 16])}}}', "x has no data_offsets, shape and dtype"),
        (f'{{"x": {entry(shape=[3])}}}', "x has bytes 0 to 8, after 0"),
        (f'{{"x": {entry(shape=[True, 2])}}}', "other data_offsets, shape or dtype"),
        (f'{{"x": {entry(shape=2)}}}', "x has no data_offsets, shape and dtype"),
        (f'{{"x": {entry(shape=[2**63, 2**63])}}}', "x has bytes 0 to 8"),
        (f'{{"x": {entry(dtype=["F32"])}}}', "other data_offsets, shape or dtype"),
        (f'{{"x": {entry(dtype="F77")}}}', "not a complete safetensors file"),
        ('{"x": []}', "x has no data_offsets"),
        ("[]", "the header is no object"),
        ("{", "not valid JSON"),
        ("{}", "18 bytes, but its tensors end at 10"),
        ("[" * 100_000, "too deeply nested"),
    ],
)
def test_a_damaged_header_is_one_line(header, complaint, tmp_path) -> None:
    path = written(tmp_path / "x.safetensors", header.encode())
    message = refusal(open_safetensors, path, "index.json")
    assert message.startswith(f"{path}: ")
    assert complaint in message


@pytest.mark.parametrize("length", [2**63, 2**40, 100])
def test_an_absurd_length_of_the_header_is_one_line(length, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert f"10 bytes, and a header of {length}" in refusal(open_safetensors, path, "index.json")


def test_files_of_the_library_are_read_as_it_reads_them(tmp_path) -> None:
    arrays = {
        "b": np.zeros((0, 3), np.float32),
        "a": np.ones((2, 3), np.float16),
        "c": np.array(3, np.int64),
        "é": np.ones(1, bool),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {entry.name: (entry.shape, entry.num_bytes) for entry in entries(tmp_path / "x.safetensors")}
    assert found == {name: (array.shape, array.nbytes) for name, array in arrays.items()}
    (tmp_path / "y.safetensors").write_bytes(save({}))
    assert entries(tmp_path / "y.safetensors") == []


def test_a_tensor_that_is_not_used_in_two_shards(folder) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    for name in ("b", "c"):
        save_file(unused, folder / f"{name}.safetensors")
    with pytest.raises(UserError) as error:
        load_model(folder, jnp.float32)
    assert "c.safetensors: model.layers.0.self_attn.rotary_emb.inv_freq: doubled" in str(error.value)


@pytest.mark.parametrize("name", ["x" * 5000, f"a/{'b' * 300}/c", "a\0b", "loop", "/dev/null"])
def test_a_model_that_cannot_be_a_folder_is_one_line(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert len(refusal(read_model_kind, name)) < 500
