"""The folder of the compilation cache, whose programs are run: only its user may write to it."""

import os
import stat
from pathlib import Path

import jax
import pytest

from rlens_jax.engine.startup import start_jax
from rlens_jax.errors import UserError


@pytest.fixture(autouse=True)
def _same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_it_is_made_for_its_user_alone(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        start_jax(compilation_cache=tmp_path / "new" / "compiled")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "compiled").stat().st_mode) == 0o700
    start_jax(compilation_cache=tmp_path / "new" / "compiled")


def test_one_that_others_can_only_read_is_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    start_jax(compilation_cache=tmp_path)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_one_that_others_can_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    (tmp_path / "link").symlink_to("cache")
    for folder in ("cache", "link"):
        with pytest.raises(
            UserError, match=rf"{folder}: other users can put programs .*; run chmod go-w on it, or choose another"
        ):
            start_jax(compilation_cache=tmp_path / folder)


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0o40755, 1, 1, 1, own + 7, 1, 1, 1, 1, 1)))
    with pytest.raises(UserError, match="belongs to another user"):
        start_jax(compilation_cache=tmp_path)


def test_one_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="the compilation cache cannot be created"):
            start_jax(compilation_cache=folder)
