"""Model names: folders, the embedded model, and repositories in the hub's cache, all offline."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.constants import HF_HUB_OFFLINE

from rlens_jax.checkpoints import model_folder
from rlens_jax.checkpoints.checkpoint import load_model, model_hash
from rlens_jax.checkpoints.model_folder import at_revision, find_model, find_source
from rlens_jax.commands import cost
from rlens_jax.errors import UserError
from rlens_jax.resources import embedded_model

NAME, COMMIT, OTHER = "Owner/tiny-vl", "1" * 40, "2" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEEDED = ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors.index.json", *SHARDS)
UNRELATED = ("LICENSE", "README.md", "onnx/model.safetensors", "original/params.json", "adapter.safetensors", "modeling_tiny.py")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in the hub's cache, without what no model needs; the cached listing of the repository names all files."""
    assert HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model_folder._description.cache_clear()
    model_folder._add_weights.cache_clear()
    repository = tmp_path / "hub" / "models--Owner--tiny-vl"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in NEEDED:
        (snapshot / name).write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))
    (repository / "refs").mkdir()
    for name, commit in (("main", COMMIT), ("v1", OTHER)):
        (repository / "refs" / name).write_text(commit)
    entry = {"size": 2, "blob_id": "0" * 40}
    (repository / "trees").mkdir()
    listing = {"format_version": 1, "files": dict.fromkeys((*NEEDED, *UNRELATED), entry)}
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps(listing))
    return repository


def test_a_cache_with_the_needed_files_is_enough(repository: Path) -> None:
    source = find_source(NAME)
    assert source == model_folder.Source(repository / "snapshots" / COMMIT, NAME, COMMIT)
    assert find_model(f"{NAME}@{COMMIT}") == find_model(NAME) == source.folder


def test_a_missing_shard_is_named_unless_no_weights_are_needed(repository: Path) -> None:
    (repository / "snapshots" / COMMIT / SHARDS[1]).unlink()
    assert find_model(NAME, weights=False).name == COMMIT
    with pytest.raises(UserError, match=rf"^{NAME}: the cache has no {SHARDS[1]}, and the hub cannot provide it"):
        find_model(NAME)


def test_a_cache_without_listing_is_taken_as_it_is(repository: Path) -> None:
    (repository / "trees" / f"{COMMIT}.json").unlink()
    assert find_model(NAME).name == COMMIT


def test_a_model_in_one_file(repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    for name in ("model.safetensors.index.json", *SHARDS):
        (snapshot / name).unlink()
    (repository / "trees" / f"{COMMIT}.json").write_text(
        (repository / "trees" / f"{COMMIT}.json").read_text().replace("model.safetensors.index.json", "model.safetensors")
    )
    with pytest.raises(UserError, match="the cache has no weights, and the hub"):
        find_model(NAME)
    (snapshot / "model.safetensors").write_text("")
    model_folder._add_weights.cache_clear()
    assert find_model(NAME) == snapshot


def test_a_local_folder_comes_first(repository: Path) -> None:
    Path(NAME).mkdir(parents=True)
    assert find_source(NAME) == model_folder.Source(Path(NAME), "tiny-vl", None)


@pytest.mark.parametrize("name", ["Owner/other", f"{NAME}@v2", f"{NAME}@v1"])
def test_what_the_cache_lacks_is_one_line(repository: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: no such folder, and the hub cannot provide it \([^\n]*\)$"):
        find_model(name)


def test_a_repository_without_config(repository: Path) -> None:
    (repository / "trees" / f"{COMMIT}.json").unlink()
    (repository / "snapshots" / COMMIT / "config.json").unlink()
    with pytest.raises(UserError, match=rf"^{NAME}: the repository has no config\.json"):
        find_model(NAME)


def test_revisions(repository: Path) -> None:
    assert at_revision("embedded", None) == "embedded"
    assert at_revision(NAME, "v1") == at_revision(f"{NAME}@v1", "v1") == f"{NAME}@v1"
    with pytest.raises(UserError, match="names another revision than --revision v2"):
        at_revision(f"{NAME}@v1", "v2")
    for local in ("embedded", str(embedded_model()), "./x/y"):
        with pytest.raises(UserError, match="only a name on the hub has a --revision"):
            at_revision(local, "v1")


def test_commands_read_a_model_from_the_cache(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache's files are links to its blobs."""
    snapshot, blobs = repository / "snapshots" / OTHER, repository / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for file in embedded_model().iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    cost.main([f"{NAME}@v1"])
    assert capsys.readouterr().out.startswith(f"{NAME}@v1: 12 layers")
    cost.main(["--model", NAME, "--revision", "v1"])
    assert capsys.readouterr().out.startswith(f"{NAME}@v1: 12 layers")
    kind, _ = load_model(f"{NAME}@v1", "float32")
    assert kind.model_type == "qwen2_vl"
    kind.preparer(find_model(f"{NAME}@v1"))
    assert model_hash(f"{NAME}@v1") == model_hash("embedded")
