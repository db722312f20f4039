"""The JSON Lines reader: each mistake is named with its line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError

GOOD: dict[str, Any] = {"image": "a.png", "question": "how many ?", "answer": "7", "dataset": "mine"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not looked at here")
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    """Rows given as text are written as they are."""
    path = folder / "my.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_samples(folder: Path):
    path = write(
        folder,
        GOOD,
        "",
        {
            "image": ["a.png", str(folder / "b.png")],
            "question": "is <image> in <image> ?\u2028",
            "answers": ["yes", "yeah"],
            "dataset": "other",
            "id": "second",
        },
    )
    assert read_jsonl(path) == [
        Sample("my.jsonl:1", "mine", (folder / "a.png",), "how many ?", ("7",)),
        Sample("second", "other", (folder / "a.png", folder / "b.png"), "is <image> in <image> ?\u2028", ("yes", "yeah")),
    ]


def test_raw_line_separators_stay_inside_their_row(folder: Path):
    path = write(folder, json.dumps(GOOD | {"question": "a\u2028b"}, ensure_ascii=False))
    assert read_jsonl(path)[0].question == "a\u2028b"


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (without("answer"), "field 'answer' (or 'answers') is missing"),
        (without("question"), "field 'question' is missing"),
        (without("dataset"), "field 'dataset' is missing"),
        (without("image"), "field 'image' is missing or empty: a prompt without an image has nothing to reduce"),
        (GOOD | {"image": []}, "field 'image' is missing or empty: a prompt without an image"),
        (GOOD | {"image": ""}, "field 'image' is an empty path"),
        (GOOD | {"image": 3}, "field 'image' must be a path or a list of paths, but has a number"),
        (GOOD | {"image": ["a.png", None]}, "field 'image' must be a path or a list of paths, but has null"),
        (GOOD | {"image": "c.png"}, "field 'image': no such file: "),
        (GOOD | {"image": "."}, "field 'image': no such file: "),
        (GOOD | {"image": "a\0.png"}, "field 'image': 'a\\x00.png' has NUL"),
        (GOOD | {"answer": " "}, "field 'answer' is empty"),
        (GOOD | {"answer": 7}, "field 'answer' must be a string, not a number"),
        (GOOD | {"question": ""}, "field 'question' is empty"),
        (GOOD | {"question": ["a"]}, "field 'question' must be a string, not a list"),
        (GOOD | {"dataset": True}, "field 'dataset' must be a string, not a boolean"),
        (GOOD | {"id": 5}, "field 'id' must be a string, not a number"),
        (GOOD | {"answers": ["7"]}, "has both fields 'answer' and 'answers'"),
        (without("answer") | {"answers": []}, "field 'answers' is empty"),
        (without("answer") | {"answers": "7"}, "field 'answers' must be a list of strings, not a string"),
        (without("answer") | {"answers": ["7", {}]}, "field 'answers' must be a list of strings, but has an object"),
        (without("answer") | {"answers": ["7", ""]}, "field 'answers' has an empty answer"),
        (GOOD | {"quesiton": "x"}, "unknown field 'quesiton' (did you mean 'question'?); known fields: "),
        (GOOD | {"video": "a.mp4"}, "field 'video': videos are not supported"),
        (GOOD | {"question": "<image> or <image> ?"}, "field 'question' has 2 <image> mark(s), but the row has 1 "),
        (GOOD | {"image": ["a.png", "b.png"], "question": "<image> ?"}, "has 1 <image> mark(s), but the row has 2 "),
        ("{'image': 1}", "not valid JSON: Expecting property name enclosed in double quotes, line 1 character 2"),
        ('{"image": "a.png"', "not valid JSON: Expecting ',' delimiter, line 1 character 18"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "a row must be a JSON object, not a list"),
        (json.dumps(GOOD)[:-1] + ', "answer": "8"}', "field 'answer' is given twice"),
    ],
)
def test_mistakes_name_file_line_and_field(folder: Path, row: Any, problem: str):
    path = write(folder, GOOD, row)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert problem in str(caught.value)


def test_duplicated_ids_name_both_lines(folder: Path):
    path = write(folder, GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"})
    with pytest.raises(UserError, match=r"my\.jsonl:3: field 'id': line 1 has the id 'x' already"):
        read_jsonl(path)
    path = write(folder, GOOD | {"id": "my.jsonl:2"}, GOOD)
    with pytest.raises(UserError, match=r"my\.jsonl:2: field 'id'"):
        read_jsonl(path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_rows_is_an_empty_dataset(folder: Path, text: str):
    with pytest.raises(UserError, match=r"my\.jsonl: empty dataset"):
        read_jsonl(write(folder, text))


def test_unreadable_files(folder: Path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.jsonl: No such file"):
        read_jsonl(folder / "gone.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(folder)
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8 text \(byte 14\)"):
        read_jsonl(folder / "latin.jsonl")
