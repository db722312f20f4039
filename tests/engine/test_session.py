"""What a run starts from: the identity of its work, and a journal that belongs to it."""

from pathlib import Path

import pytest

from rlens_jax.config import ComputeConfig, DataConfig, SearchConfig
from rlens_jax.engine.session import ModelFolder, Session, load
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes
from rlens_jax.plan import Plan, Reduction
from rlens_jax.search.record import Record

ALONE = Processes()
DATA = DataConfig(validation_samples=1, test_samples=1)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.find("embedded", ALONE)


def test_work_is_identified_by_weights_and_settings(folder: ModelFolder) -> None:
    identity = folder.identity({"data_hash": "d", "seed": 1})
    assert identity["model_hash"] == folder.weights_hash
    assert identity["device"] == "cpu"
    assert folder.identity({"data_hash": "d", "seed": 1}) == identity
    assert folder.identity({"data_hash": "other", "seed": 1}) != identity
    assert ModelFolder(folder.path, folder.kind, "other").identity({"data_hash": "d", "seed": 1}) != identity


def test_a_journal_is_resumed_with_the_same_settings_only(tmp_path: Path) -> None:
    record = Record("test", Plan(), "pages", (1.0,), 0.5)
    with Session.open(ModelFolder.find("embedded", ALONE), tmp_path, DATA, {"penalty": 2}, ALONE, seed=0) as session:
        assert {name: len(samples) for name, samples in session.splits.items()} == {"validation": 3, "test": 3}
        assert session.resumed == 0
        session.journal.append(record)
    with Session.open(ModelFolder.find("embedded", ALONE), tmp_path, DATA, {"penalty": 2}, ALONE, seed=0) as session:
        assert session.resumed == 1
        assert session.journal.records() == (record,)
    opened = Session.open(ModelFolder.find("embedded", ALONE), tmp_path, DATA, {"penalty": 3}, ALONE, seed=0)
    with pytest.raises(UserError, match="penalty was 2, is 3"), opened:
        pass


def test_a_configured_batch_size_stays(folder: ModelFolder) -> None:
    compute = ComputeConfig(batch_size=3, text_slots=(16,), visual_slots=(64,), patch_slots=(256,))
    assert load(folder, compute, Reduction(), SearchConfig()).shapes.batch_size == 3
