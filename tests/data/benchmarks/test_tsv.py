"""The TSV reader: the same cells as VLMEvalKit reads, at any size, and one clear error for each kind of damage."""

import csv
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlens_jax.data.benchmarks import tsv
from rlens_jax.data.benchmarks.tsv import MISSING, TsvTable, as_read, parse_list, scan
from rlens_jax.errors import UserError
from tests.data.benchmarks.files import encoded, md5_of, picture, write_tsv

NEEDED = ("question", "answer")


def row(index: object, image: object, **changes: object) -> dict[str, object]:
    return {"index": index, "image": image, "question": "Why?", "answer": "so", **changes}


def read(tmp_path: Path, *rows: Mapping[str, object]) -> TsvTable:
    return scan(write_tsv(tmp_path / "MME.tsv", rows), NEEDED)


def read_with_images(tmp_path: Path, *rows: Mapping[str, object]) -> None:
    table = read(tmp_path, *rows)
    for item in table.rows:
        table.images(item)


def refusal(tmp_path: Path, *rows: Mapping[str, object]) -> str:
    """The error message, without the folder."""
    with pytest.raises(UserError) as caught:
        read_with_images(tmp_path, *rows)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path}/MME.tsv: ")
    return message.removeprefix(f"{tmp_path}/")


def test_images_are_the_bytes_that_were_encoded(tmp_path: Path) -> None:
    """Images in the row, by reference backwards, forwards and in a chain, and lists: each in the right row."""
    a, b, c = picture(1), picture(2, "jpeg"), picture(3)
    table = read(
        tmp_path,
        row("x", "30"),
        row(10, encoded(a)),
        row(20, "10"),
        row(30, encoded(b)),
        row(40, "20"),
        row(50, str([encoded(c), encoded(a)])),
        row(60, "50"),
        row(70, f"{encoded(c)[:40]}\n{encoded(c)[40:]}\n"),
    )
    assert [item.index for item in table.rows] == ["x", "10", "20", "30", "40", "50", "60", "70"]
    assert [table.images(item) for item in table.rows] == [(b,), (a,), (a,), (b,), (a,), (c, a), (c, a), (c,)]
    hashes = {content: table.rows[place].image_hashes for place, content in ((0, b), (1, a), (7, c))}
    for item in table.rows:
        assert item.image_hashes == tuple(hashes[content][0] for content in table.images(item))


def test_a_reference_has_at_most_64_characters(tmp_path: Path) -> None:
    short = "r" * 64
    table = read(tmp_path, row(short, encoded(picture(1))), row(2, short))
    assert table.images(table.rows[1]) == (picture(1),)
    assert "field 'image': not base64" in refusal(tmp_path, row("-" * 65, encoded(picture(1))), row(2, "-" * 65))


def test_texts_as_pandas_reads_them(tmp_path: Path) -> None:
    image = encoded(picture(1))
    texts = ['say "no"', "two\nlines", "a\ttab", '"', "é 字 \u2028", "  spaces  ", 'in "the" middle', "\r\n"]
    table = read(tmp_path, *(row(i, image, question=text) for i, text in enumerate(texts)))
    assert [item.cells["question"] for item in table.rows] == texts
    assert [table.images(item) for item in table.rows] == [(picture(1),)] * len(texts)


def test_raw_quoting_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    """Quotation marks mean something only at the beginning of a cell; text may follow the closing one."""
    path, image = tmp_path / "MME.tsv", encoded(picture(1))
    path.write_bytes(
        b"\xef\xbb\xbfindex\tquestion\tanswer\timage\r\n\r\n   \r\n"
        + f'1\tis 5" long\t"a"b\t{image}\r\n\n2\t"""q"""\tx y\t"{image}"'.encode()
    )
    table = scan(path, NEEDED)
    assert [dict(item.cells) for item in table.rows] == [
        {"question": 'is 5" long', "answer": "ab"},
        {"question": '"q"', "answer": "x y"},
    ]
    assert [table.images(item) for item in table.rows] == [(picture(1),)] * 2


def test_md5_rows_and_progress(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [row(i, encoded(picture(i))) for i in range(5)])
    steps: list[int] = []
    table = scan(path, NEEDED, advance=steps.append)
    assert table.md5 == md5_of(path)
    assert sum(steps) == path.stat().st_size
    assert len(steps) == 6
    assert [item.number for item in table.rows] == [1, 2, 3, 4, 5]


def test_rows_without_an_image_are_left_out_even_as_references(tmp_path: Path) -> None:
    image = encoded(picture(1))
    table = read(tmp_path, row(1, ""), row(2, image), row(3, "NaN"), row(3, image))
    assert [(item.number, item.index) for item in table.rows] == [(2, "2"), (4, "3")]
    assert (
        refusal(tmp_path, row(1, ""), row(2, "1"))
        == "MME.tsv: row 2 (index '2'), field 'image': refers to index '1', which no row with an image has"
    )


def test_missing_values_and_optional_columns(tmp_path: Path) -> None:
    image = encoded(picture(1))
    path = write_tsv(
        tmp_path / "a.tsv",
        [row(1, image, hint="None", more="x"), row(2, image, hint="", more="x"), row(3, image, hint="none", more="x")],
    )
    table = scan(path, ("question",), ("hint", "absent"))
    assert [item.value("hint") for item in table.rows] == [None, None, "none"]
    assert table.rows[0].value("absent") is None
    assert table.rows[0].value("question") == "Why?"
    assert set(table.rows[0].cells) == {"question", "hint"}
    # Of pandas 2 and 3.
    assert len(MISSING) == 19
    assert {"", "#N/A", "<NA>", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"} < MISSING


@pytest.mark.parametrize(
    ("texts", "read"),
    [
        (["None", "N/A", "", "n/a", "nan", "x"], ["nan"] * 5 + ["x"]),
        ([" None", "none", "N/A."], [" None", "none", "N/A."]),
        (["7", "7.50", "007"], ["7.0", "7.5", "7.0"]),
        (["7", "007", "-3", " 5 "], ["7", "7", "-3", "5"]),
        (["7", "007", "None"], ["7.0", "7.0", "nan"]),
        (["7", "7.50", "007", "x"], ["7", "7.50", "007", "x"]),
        (["10", ""], ["10.0", "nan"]),
        ([".5", "1e3", "-inf", "2."], ["0.5", "1000.0", "-inf", "2.0"]),
        (["1,000"], ["1,000"]),
        (["1_0"], ["1_0"]),
        (["\u0665"], ["\u0665"]),  # a digit to Python, not to pandas
        (["9" * 5000], ["9" * 5000]),
        (["", "None"], ["nan", "nan"]),
        ([], []),
    ],
)
def test_a_column_as_pandas_reads_it(texts: list[str], read: list[str]) -> None:
    """Worked examples of what becomes missing, and of columns of numbers."""
    assert as_read(texts) == read


def test_columns_of_numbers(tmp_path: Path) -> None:
    """The rows that are left out for want of an image decide, too."""
    image = encoded(picture(1))
    table = read(tmp_path, row(1, image, answer="007"), row(2, image, answer="8"))
    assert [item.cells["answer"] for item in table.rows] == ["7", "8"]
    table = read(tmp_path, row(1, image, answer="007"), row(2, "", answer="x"))
    assert [item.cells["answer"] for item in table.rows] == ["007"]
    table = read(tmp_path, row(1, image, answer="007"), row(2, "", answer=""))
    assert [item.cells["answer"] for item in table.rows] == ["7.0"]


def test_large_cells(tmp_path: Path) -> None:
    """Beyond the csv module's own limit, with quotation marks in the row and without; a PNG may have anything after its end."""
    large = picture(1) + bytes(1_000_000)
    images = (encoded(large), str([encoded(large), encoded(picture(2))]))
    questions = ("Why?", 'Why "not"?')
    table = read(tmp_path, *(row(f"{q}{len(i)}", i, question=q) for q in questions for i in images))
    assert [table.images(item) for item in table.rows] == [(large,), (large, picture(2))] * 2


def test_missing_column(tmp_path: Path) -> None:
    misspelt = {"index": 1, "image": "", "questoin": "Why?", "answer": "so"}
    assert (
        refusal(tmp_path, misspelt)
        == "MME.tsv: column 'question' is missing (did you mean 'questoin'?); the file has: 'index', 'image', 'questoin', "
        "'answer'"
    )
    assert "column 'image' is missing" in refusal(tmp_path, {"index": 1, "question": "", "answer": ""})
    assert "column 'index' is missing" in refusal(tmp_path, {"image": 1, "question": "", "answer": ""})


def test_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "MME.tsv"
    path.write_text("index\tquestion\tanswer\tquestion\timage\n")
    with pytest.raises(UserError, match="there are two columns 'question'"):
        scan(path, NEEDED)


@pytest.mark.parametrize(
    "text",
    [
        encoded(picture(1))[:-3],
        encoded(picture(1)).replace("A", "-", 1),
        "é" * 70,
        "data:image/png;base64," + encoded(picture(1)),
    ],
)
def test_broken_base64(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, row(1, encoded(picture(1))), row(7, text))
    assert message.startswith("MME.tsv: row 2 (index '7'), field 'image': not base64: ")


def test_not_an_image(tmp_path: Path) -> None:
    message = refusal(tmp_path, row(7, str([encoded(picture(1)), encoded(b"text" * 20)])))
    assert message.startswith("MME.tsv: row 1 (index '7'), field 'image': image 2 of 2 is not an image: ")


def test_a_reference_to_no_row(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, row(1, encoded(picture(1))), row(7, "8"))
        == "MME.tsv: row 2 (index '7'), field 'image': refers to index '8', which no row with an image has"
    )


@pytest.mark.parametrize(
    ("references", "way"), [(["1"], "1 -> 1"), (["2", "3", "1"], "1 -> 2 -> 3 -> 1"), (["2", "2"], "1 -> 2 -> 2")]
)
def test_a_circle_of_references(tmp_path: Path, references: list[str], way: str) -> None:
    rows = (row(i, reference) for i, reference in enumerate(references, 1))
    assert refusal(tmp_path, *rows) == f"MME.tsv: row 1 (index '1'), field 'image': the references form a circle: {way}"


NO_LISTS = ("['{0}', '{0}]", "['{0}', b]", "[" * 300 + "'{0}'" + "]" * 300, f"[{'-' * 3000}1]", f"[{'-' * 20000}1]")


@pytest.mark.parametrize("damage", NO_LISTS, ids=range(len(NO_LISTS)))
def test_a_list_of_images_that_is_none(tmp_path: Path, damage: str) -> None:
    """Python's parser has five ways to say so."""
    message = refusal(tmp_path, row(7, damage.format(encoded(picture(1)))))
    assert message.startswith("MME.tsv: row 1 (index '7'), field 'image': ")
    assert message.endswith("begins like a Python list but is not one")
    assert len(message) < 250  # not the whole cell


def test_an_empty_list_of_images(tmp_path: Path) -> None:
    assert refusal(tmp_path, row(7, f"[{' ' * 70}]")).endswith("field 'image': an empty list of images")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, of 100 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", bytes(20)) + chunk(b"IEND", b"")


def test_an_image_of_200_megapixels(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, row(7, encoded(png_header(20_000, 10_000))))
        == "MME.tsv: row 1 (index '7'), field 'image' has 20000 x 10000 = 200000000 pixels, more than the 100000000 allowed; "
        "make it smaller"
    )


def test_an_index_twice(tmp_path: Path) -> None:
    rows = (row(index, encoded(picture(1))) for index in (7, 8, 7))
    assert refusal(tmp_path, *rows) == "MME.tsv: row 3 (index '7'), field 'index': row 1 has this index already"


def test_no_index(tmp_path: Path) -> None:
    assert refusal(tmp_path, row("", encoded(picture(1)))) == "MME.tsv: row 1, field 'index': missing"


def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for content, complaint in (("", "the file is empty"), ("index\tquestion\tanswer\timage\n", "no row has an image")):
        path.write_text(content)
        with pytest.raises(UserError, match=f"a.tsv: {complaint}$"):
            scan(path, NEEDED)
    assert refusal(tmp_path, row(1, ""), row(2, "")) == "MME.tsv: no row has an image"


@pytest.mark.parametrize(("tail", "count"), [("2\tq\ta\n", 3), ("2\tq\ta\tb\tc\n", 5)])
def test_a_damaged_row(tmp_path: Path, tail: str, count: int) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(f"index\tquestion\tanswer\timage\n1\tq\ta\t{encoded(picture(1))}\n{tail}")
    with pytest.raises(UserError, match=f"a.tsv: row 2 has {count} fields, the header 4; the file is damaged"):
        scan(path, NEEDED)


def test_a_quotation_mark_that_is_never_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, head = tmp_path / "a.tsv", "index\tquestion\tanswer\timage\n"
    path.write_text(head + '1\t"q\ta\tb\n2\tq\ta\tb\n')
    with pytest.raises(UserError, match=f"row at byte {len(head)} opens a quotation mark that is never closed"):
        scan(path, NEEDED)
    path.write_text(head + '1\t"q\ta\tb\n' + "2\tq\ta\tb\n" * 9)
    limit = csv.field_size_limit(20)
    try:
        with pytest.raises(UserError, match=r"byte \d+ cannot be read: .*is a quotation mark not closed"):
            scan(path, NEEDED)
    finally:
        csv.field_size_limit(limit)
    monkeypatch.setattr(tsv, "_MAX_LINE_BYTES", 50)
    path.write_text(head + "x" * 60)
    with pytest.raises(UserError, match="a line is longer than 50 bytes; is this a TSV file"):
        scan(path, NEEDED)


def test_wrong_encodings_and_places(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"index\tquestion\tanswer\timage\n1\tcaf\xe9\ta\tb\n")
    with pytest.raises(UserError, match=re.escape("not UTF-8 text (byte 33)")):
        scan(path, NEEDED)
    path.write_bytes(b"index\tquestion\tanswer\timage\n1\tca\0f\ta\tb\n")
    with pytest.raises(UserError, match=re.escape("NUL at byte 32; the file is damaged")):
        scan(path, NEEDED)
    os.mkfifo(tmp_path / "pipe.tsv")
    for name, problem in (("b.tsv", "No such file"), (".", "not a regular file"), ("pipe.tsv", "not a regular file")):
        with pytest.raises(UserError, match=f"cannot read .*: {problem}"):
            scan(tmp_path / name, NEEDED)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("['what \\ud83d']", "has NUL or half of a surrogate pair"),
        ("['a\\0b']", "has NUL or half of a surrogate pair"),
        (f"[0x{'f' * 9000}]", "has a number that is too long"),
        (f"[{'9' * 9000}]", "begins like a Python list but is not one"),
    ],
)
def test_texts_in_a_list_that_nothing_can_use(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{problem}$") as caught:
        parse_list(text, "here")
    assert len(str(caught.value)) < 200
