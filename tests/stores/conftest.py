"""One fake store for all tests here: fsspec keeps its connection for as long as the process lives."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.fake_store import FakeStore


@pytest.fixture(scope="session")
def running() -> Iterator[FakeStore]:
    store = FakeStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setitem(os.environ, name, value)
        yield store
    store.close()


@pytest.fixture
def store(running: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """The store, empty and well, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running.reset()
    yield running
    running.reset()
