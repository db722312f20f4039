"""The JSON Lines reader: each mistake is named with its line and field."""

import json
import os
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
            "images": ["a.png", str(folder / "b.png")],
            "question": "is <image> in <image> ?\u2028",
            "answers": ["yes", " yeah\n", "yes "],
            "dataset": "other",
            "id": "second",
            "marks": True,
        },
    )
    assert read_jsonl(path) == [
        Sample("my.jsonl:1", "mine", (folder / "a.png",), "how many ?", ("7",)),
        Sample("second", "other", (folder / "a.png", folder / "b.png"), "is <image> in <image> ?\u2028", ("yes", "yeah"), True),
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
        (without("image"), "field 'image' (or 'images') is missing or empty: a prompt without an image has nothing to reduce"),
        (GOOD | {"image": []}, "field 'image' (or 'images') is missing or empty: a prompt without an image"),
        (without("image") | {"images": []}, "field 'image' (or 'images') is missing or empty: a prompt without an image"),
        (GOOD | {"images": ["a.png"]}, "has both fields 'image' and 'images'; keep one of them"),
        (without("image") | {"images": ["c.png"]}, "field 'images': no such file: "),
        (
            GOOD | {"image": "data:image/png;base64," + "iVBO/+" * 500_000},
            "field 'image' is a data URL; write the image to a file",
        ),
        (GOOD | {"image": "iVBO/+" * 500}, "image data must be in a file"),
        (GOOD | {"image": "x" * 3000}, "field 'image': no such file: "),
        (GOOD | {"image": "https://a.org/b.png"}, "field 'image' is a URL (https://a.org/b.png); download the image"),
        (GOOD | {"image": ""}, "field 'image' is an empty path"),
        (GOOD | {"image": 3}, "field 'image' must be a path or a list of paths, but has a number"),
        (GOOD | {"image": ["a.png", None]}, "field 'image' must be a path or a list of paths, but has null"),
        (GOOD | {"image": "c.png"}, "field 'image': no such file: "),
        (GOOD | {"image": "."}, "field 'image': not a regular file: "),
        (GOOD | {"image": "a\0.png"}, "field 'image': 'a\\x00.png' has NUL"),
        (GOOD | {"answer": " "}, "field 'answer' is empty"),
        (GOOD | {"answer": True}, "field 'answer' must be a string, not a boolean"),
        (GOOD | {"question": 7}, "field 'question' must be a string, not a number"),
        (GOOD | {"image": 1.5}, "field 'image' must be a path or a list of paths, but has a number"),
        (GOOD | {"answer": float("nan")}, "not valid JSON: NaN is not a number"),
        (GOOD | {"marks": 1}, "field 'marks' must be true or false, not a number"),
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
        (
            GOOD | {"marks": True, "question": "<image> or <image> ?"},
            "field 'question' has 2 <image> mark(s), but the row has 1 ",
        ),
        (
            GOOD | {"marks": True},
            "field 'question' has 0 <image> mark(s), but the row has 1 image(s); use one mark per image, or ",
        ),
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
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("field", [*GOOD, "id", "what"])
@pytest.mark.parametrize("text", ["what \ud83d", "a\0b"])
def test_half_of_a_surrogate_pair_and_nul(folder: Path, field: str, text: str):
    with pytest.raises(UserError, match=r"my\.jsonl:1: .* has NUL or half of a surrogate pair"):
        read_jsonl(write(folder, GOOD | {field: text}))


def test_a_number_that_int_refuses(folder: Path):
    for field in {*GOOD, "id", "what"} - {"answer"}:
        with pytest.raises(UserError, match=r"my\.jsonl:1: .*field "):
            read_jsonl(write(folder, json.dumps(GOOD | {field: "#"}).replace('"#"', "7" * 5000)))
    assert read_jsonl(write(folder, json.dumps(GOOD | {"answer": "#"}).replace('"#"', "7" * 5000)))[0].answers == ("7" * 5000,)


@pytest.mark.parametrize("written", ["1.0", "1e3", "-0", "9007199254740993", "1E400"])
def test_a_number_is_its_text(folder: Path, written: str):
    rows = [json.dumps(without("answer"))[:-1] + f', "answer{end}}}' for end in (f'": {written}', f's": [{written}]')]
    assert [sample.answers for sample in read_jsonl(write(folder, *rows))] == [(written,), (written,)]


def test_equal_answers_are_equal(folder: Path):
    """White space at the ends, and letters that are composed or not (NFC, NFD)."""
    path = write(folder, *(GOOD | {"answer": text} for text in (" 9 ", "9\n", "caf\u00e9", "cafe\u0301")))
    assert [sample.answers for sample in read_jsonl(path)] == [("9",), ("9",), ("caf\u00e9",), ("caf\u00e9",)]


def test_a_mark_is_text_unless_the_row_says_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    question = "How do I convert this to an <image> tag?"
    path = write(folder, GOOD | {"question": question}, GOOD | {"question": question, "marks": True})
    assert [(sample.question, sample.marked) for sample in read_jsonl(path)] == [(question, False), (question, True)]
    assert f'note: {path}: <image> is text in 1 question(s); "marks": true makes it the place' in capsys.readouterr().err


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
    with pytest.raises(UserError, match=r"latin\.jsonl:1: not UTF-8 text \(byte 14\)"):
        read_jsonl(folder / "latin.jsonl")


def test_a_byte_order_mark_and_empty_lines(folder: Path):
    path = folder / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert [sample.id for sample in read_jsonl(path)] == ["marked.jsonl:1", "marked.jsonl:3"]


def test_files_that_block_and_lines_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_jsonl(folder / "pipe.jsonl")
    monkeypatch.setattr("rlens_jax.data.jsonl.LARGEST_TEXT", 100)
    with pytest.raises(UserError, match=r"my\.jsonl:2: a line is longer than 100 bytes"):
        read_jsonl(write(folder, GOOD, GOOD | {"question": "why? " * 100}))
