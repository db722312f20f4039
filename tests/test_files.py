"""Files are replaced whole or not at all; an unreadable file is reported in one line."""

import os
from pathlib import Path

import pytest

from rlens_jax.errors import UserError
from rlens_jax.files import json_text, read_json, replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = replace_file(tmp_path / "a.txt", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
        replace_file(tmp_path / "missing" / "a.txt", b"new")


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"layers": [3, 1], "mean": 0.1, "name": "é"}
    path = replace_file(tmp_path / "a.json", json_text(value).encode())
    assert read_json(path) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"mean": float("nan")})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"cannot read .*a\.json: No such file"),
        (b"\xff", r"a\.json: not UTF-8 text \(byte 0\)"),
        (b'{"a":\n', r"a\.json: not valid JSON: Expecting value, line 2 character 1"),
        (b"[Infinity]", r"a\.json: not valid JSON: Infinity is not a number"),
        (b"[" * 100_000, r"a\.json: not valid JSON: too deeply nested"),
        (b"9" * 10_000, r"a\.json: not readable as JSON"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', r"a\.json: field 'b' is given twice"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_json(tmp_path / "a.json")
