"""Files are replaced whole or not at all; an unreadable file is reported in one line."""

import os
from pathlib import Path

import pytest

from rlens_jax.errors import UserError
from rlens_jax.files import json_text, new_folder, read_json, read_json_object, read_text, replace_file


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


def test_leftovers_of_a_folder_are_found_whatever_its_name(tmp_path: Path) -> None:
    for name in ("x[v1]y", "xvy"):
        (tmp_path / f".{name}.1.partial").mkdir()
    with new_folder(tmp_path / "x[v1]y"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".xvy.1.partial", "x[v1]y"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"cannot read .*a\.json: No such file"),
        (b"\xff", r"a\.json: not UTF-8 text \(byte 0\)"),
        (b'{"a":\n', r"a\.json: not valid JSON: Expecting value, line 2 character 1"),
        (b"[Infinity]", r"a\.json: not valid JSON: Infinity is not a number"),
        (b"[" * 100_000, r"a\.json: not valid JSON: too deeply nested"),
        (b"[" * 65 + b"]" * 65, r"a\.json: not valid JSON: too deeply nested"),
        (b"9" * 10_000, r"a\.json: a number of 10000 digits is too long"),
        (b"[1e400]", r"a\.json: the number 1e400 is too large"),
        (b'{"a": "what \\ud83d"}', r"a\.json: field 'a': 'what \\ud83d' has NUL or half of a surrogate pair"),
        (b'{"a": {"\\u0000": 1}}', r"a\.json: field 'a': '\\x00' has NUL or half of a surrogate pair"),
        (b"[1]", r"a\.json: must hold a JSON object, not a list"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', r"a\.json: field 'b' is given twice"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_json_object(tmp_path / "a.json")


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "long").write_text("x" * 11)
    for name, complaint in {
        "fifo": "not a regular file",
        ".": "not a regular file",
        "loop": "Too many levels of symbolic links",
        "a\0b": "not a file name",
        "a\ud83d": "not a file name",
        "x" * 3000: "File name too long",
        "long": "longer than the 10 bytes",
    }.items():
        with pytest.raises(UserError, match=complaint):
            read_text(tmp_path / name, limit=10)


def test_numbers_and_texts_of_real_files_are_read(tmp_path: Path) -> None:
    path = replace_file(
        tmp_path / "a.json", b'{"model_max_length": 1000000000000000019884624838656, "eps": 1e-400, "a": "\\ud83d\\ude00"}'
    )
    assert read_json(path) == {"model_max_length": 1000000000000000019884624838656, "eps": 0.0, "a": "\U0001f600"}
