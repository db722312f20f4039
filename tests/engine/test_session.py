"""What a run starts from: the identity of its work, and a journal that belongs to it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlens_jax.config import ComputeConfig, DataConfig, RunConfig, SearchConfig
from rlens_jax.engine.session import ModelFolder, Session, load
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Record

ALONE = Processes()
DATA = DataConfig("pages", validation_samples=1, test_samples=1)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.find("embedded")


def test_work_is_identified_by_weights_and_settings(folder: ModelFolder, tmp_path: Path) -> None:
    identity = folder.identity({"data_hash": "d", "seed": 1})
    assert identity["model_hash"] == folder.weights_hash
    assert identity["device"] == "cpu"
    assert folder.identity({"data_hash": "d", "seed": 1}) == identity
    assert folder.identity({"data_hash": "other", "seed": 1}) != identity
    changed = tmp_path / "changed"
    shutil.copytree(folder.path, changed)
    with (changed / "model.safetensors").open("ab") as weights:
        weights.write(b" ")
    assert ModelFolder.find(changed).identity({"data_hash": "d", "seed": 1}) != identity


def test_a_model_is_found_without_reading_its_weights(folder: ModelFolder, tmp_path: Path) -> None:
    shutil.copy(folder.path / "config.json", tmp_path)
    described = ModelFolder.find(tmp_path)
    assert described.kind.config == folder.kind.config
    with pytest.raises(UserError, match="safetensors"):
        described.identity({})


def test_a_journal_is_resumed_with_the_same_settings_only(folder: ModelFolder, tmp_path: Path) -> None:
    record = Record("test", Plan(), [1], [1.0], 0.5)
    config = RunConfig(output=str(tmp_path), data=DATA)
    with Session.open(folder, config, ALONE) as session:
        assert {name: len(split.samples) for name, split in session.splits.items()} == {"validation": 3, "test": 3}
        assert session.resumed == 0
        session.journal.append(record)
    with Session.open(folder, config, ALONE) as session:
        assert session.resumed == 1
        assert session.journal.outcomes("test", Plan(), 3)[1] == 1.0
    opened = Session.open(folder, replace(config, search=SearchConfig(penalty=3.0)), ALONE)
    with pytest.raises(UserError, match=r"penalty was 2(\.0)?, is 3(\.0)?"), opened:
        pass


def test_a_configured_batch_size_stays(folder: ModelFolder, tmp_path: Path) -> None:
    config = RunConfig(output=str(tmp_path), data=DATA, compute=ComputeConfig(batch_size=3))
    with Session.open(folder, config, ALONE) as session:
        assert load(session).shapes.batch_size == 3
