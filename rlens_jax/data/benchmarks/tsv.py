"""Read VLMEvalKit's TSV files of any size in little memory.

    table = scan(Path("MMStar.tsv"), needed=("question", "answer"), optional=("hint",))
    for row in table.rows:
        row.cells["question"], table.images(row)

The format is that of pandas.to_csv with tabs, one question per row. `image` contains a file in base64, or a Python list of
such files, or, in at most 64 characters, the index of another row with the same image. The file is read twice: `scan` keeps
the offset of every row and all cells except images, and `TsvTable.images` reads the images of one row.
"""

import ast
import base64
import csv
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from rlens_jax.data.images import check_image
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import check_text, open_file

REFERENCE_CHARS = 64
"""Most characters of an image cell that is the index of another row (VLMEvalKit, image_base.py)."""
MAX_FIELD_CHARS = 64 * 2**20
"""Most characters of a cell in a row with quotation marks: image files of 48 MB. The csv module needs 4 bytes per character."""
MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Texts that pandas.read_csv, and so VLMEvalKit, reads as a missing value."""
_WHOLE = re.compile(r"\s*[+-]?0*[0-9]{1,18}\s*", re.ASCII)
"""A whole number in 64 bits. Of longer ones pandas makes no number either."""
_FRACTION = re.compile(
    r"\s*[+-]?(([0-9]+\.[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+|inf(inity)?)\s*", re.ASCII | re.IGNORECASE
)
_MAX_LINE_BYTES = 2 * MAX_FIELD_CHARS

# The limit holds for the whole process; the csv module has no other. Its default of 131072 is less than most images need.
# Without a limit, a quotation mark that is never closed would read the rest of the file into one cell.
csv.field_size_limit(MAX_FIELD_CHARS)


@dataclass(frozen=True)
class TsvRow:
    """A row with an image.

    Attributes:
        number: number of the row in the file, from 1, without the header.
        index: the cell `index`.
        cells: text per column, of the requested columns that the file has.
        image_offset: offset in bytes of the row that contains this row's image.
        image_bytes: length of the image's text.
        image_hashes: one per image, equal for files of equal content.
    """

    number: int
    index: str
    cells: Mapping[str, str]
    image_offset: int
    image_bytes: int
    image_hashes: tuple[bytes, ...]

    def value(self, column: str) -> str | None:
        """The text of a cell; None if pandas reads it as missing or the file lacks the column."""
        text = self.cells.get(column, "")
        return None if text in MISSING else text


@dataclass(frozen=True)
class TsvTable:
    """A scanned file."""

    path: Path
    md5: str
    rows: Sequence[TsvRow]
    columns: Sequence[str]
    """Names of all columns, in the file's order."""

    def where(self, row: TsvRow, field: str) -> str:
        """The place of a cell, for errors."""
        return _where(self.path, row.number, row.index, field)

    def images(self, row: TsvRow) -> tuple[bytes, ...]:
        """The encoded image files of a row. UserError if one is not base64, not an image, or too large."""
        where, place = self.where(row, "image"), self.columns.index("image")
        with open_file(self.path) as file:
            file.seek(row.image_offset)
            _, fields = next(_rows(_Lines(file, self.path), self.path))
        images = _decoded(fields[place], where)
        for number, content in enumerate(images, 1):
            check_image(content, where if len(images) == 1 else f"{where}: image {number} of {len(images)}")
        return images


def scan(
    path: Path,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    advance: Callable[[int], None] = lambda num_bytes: None,
    *,
    lower_case: bool = False,
) -> TsvTable:
    """Read a file once and keep the places of its rows and all cells except images. Rows without an image are left out.

    The cells of a column in which all look like numbers are the texts of these numbers, as VLMEvalKit sees them (`as_read`).

    Args:
        needed: columns that the file must have in addition to `index` and `image`.
        optional: columns that are kept if the file has them.
        advance: called with the number of bytes read since the last call.
        lower_case: read the names of columns in lower case, except single capitals, as VLMEvalKit does for multiple choice.

    Raises:
        UserError: the file cannot be read; a column is missing or occurs twice; a row is cut off; an index is missing or
            occurs twice; an image refers to no row with an image or, through others, to itself; no row has an image.
    """
    digest = hashlib.md5(usedforsecurity=False)
    rows: dict[str, TsvRow] = {}
    references: dict[str, str] = {}

    def count(line: bytes) -> None:
        digest.update(line)
        advance(len(line))

    with open_file(path) as file:
        numbered = enumerate(_rows(_Lines(file, path, count), path))
        _, (_, header) = next(numbered, (0, (0, [])))
        if lower_case:
            header = [name if re.fullmatch("[A-Z]", name) else name.lower() for name in header]
        _check_header(header, ("index", *needed, "image"), path)
        kept = {name: header.index(name) for name in (*needed, *optional) if name in header}
        index_at, image_at = header.index("index"), header.index("image")
        # Rows without an image count, too: pandas types a column before VLMEvalKit drops them.
        columns: dict[str, list[str]] = {name: [] for name in kept}
        for number, (offset, fields) in numbered:
            if len(fields) != len(header):
                raise UserError(f"{path}: row {number} has {len(fields)} fields, the header {len(header)}; the file is damaged")
            for name, cells_of in columns.items():
                cells_of.append(fields[kept[name]])
            index, image = fields[index_at], fields[image_at]
            if image in MISSING:
                continue
            if index in MISSING:
                raise UserError(f"{path}: row {number}, field 'index': missing")
            cells = {name: fields[place] for name, place in kept.items()}
            if index in rows:
                raise UserError(f"{_where(path, number, index, 'index')}: row {rows[index].number} has this index already")
            hashes: tuple[bytes, ...] = ()
            if len(image) <= REFERENCE_CHARS:
                references[index] = image
            else:
                contents = _decoded(image, _where(path, number, index, "image"))
                hashes = tuple(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
            rows[index] = TsvRow(number, index, cells, offset, len(image), hashes)
    if not rows:
        raise UserError(f"{path}: no row has an image")
    formats = {name: _number_format(cells_of) for name, cells_of in columns.items()}
    for index, row in rows.items():
        rows[index] = replace(row, cells={name: formats[name](text) for name, text in row.cells.items()})
    return TsvTable(path, digest.hexdigest(), _resolved(rows, references, path), header)


def as_read(texts: Sequence[str]) -> list[str]:
    """The texts of a column after it was written to a file and read by pandas, as VLMEvalKit reads predictions.

    A text that pandas takes for a missing value becomes "nan". If all others look like numbers they become numbers: of "7" and
    "7.50" in one column, "7.0" and "7.5". One other text protects the column.
    """
    number = _number_format(texts)
    return ["nan" if text in MISSING else number(text) for text in texts]


def _number_format(cells: Sequence[str]) -> Callable[[str], str]:
    """The text that a cell of this column has after reading, for cells that are not missing."""
    present = [cell for cell in cells if cell not in MISSING]
    if not present or not all(_WHOLE.fullmatch(cell) or _FRACTION.fullmatch(cell) for cell in present):
        return lambda cell: cell
    whole = len(present) == len(cells) and all(map(_WHOLE.fullmatch, present))  # a missing value is a float
    return lambda cell: cell if cell in MISSING else str(int(cell) if whole else float(cell))


def parse_list(text: str, where: str) -> list[str]:
    """The items of a Python list literal, numbers as texts. UserError for any other text."""
    try:
        with warnings.catch_warnings():
            # LaTeX in a list may have backslashes that are not escapes. Python keeps them, also in VLMEvalKit.
            warnings.simplefilter("ignore")
            items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: {_short(text)} begins like a Python list but is not one") from None
    if not isinstance(items, list) or not all(isinstance(item, str | int | float) for item in items):
        raise UserError(f"{where}: {_short(text)} must be a list of texts")
    try:
        texts = [str(item) for item in items]
    except ValueError:  # hexadecimal digits may make a number of thousands of digits
        raise UserError(f"{where}: {_short(text)} has a number that is too long") from None
    check_text("".join(texts), where)
    return texts


class _Lines:
    """The decoded lines of a file, with the offset of the next line and whether the end was passed.

    Calls `seen` with each line.
    """

    def __init__(self, file: BinaryIO, path: Path, seen: Callable[[bytes], None] = lambda line: None):
        self._file, self._path, self._seen = file, path, seen
        self.offset, self.ended = file.tell(), False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE_BYTES)
        if not line:
            self.ended = True
            raise StopIteration
        if len(line) == _MAX_LINE_BYTES:
            raise UserError(f"{self._path}: a line is longer than {_MAX_LINE_BYTES} bytes; is this a TSV file?")
        begin, self.offset = self.offset, self.offset + len(line)
        if (place := line.find(b"\0")) >= 0:
            raise UserError(f"{self._path}: NUL at byte {begin + place}; the file is damaged")
        self._seen(line)
        try:
            return line.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: not UTF-8 text (byte {begin + error.start})") from None


def _rows(lines: _Lines, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The offset of each row, and its fields as pandas.read_csv separates them."""
    while True:
        begin = lines.offset
        line = next(lines, None)
        if line is None:
            return
        content = line.rstrip("\r\n")
        if '"' not in content and "\r" not in content:
            fields = content.split("\t")  # the same, 20 times as fast
        else:
            fields = _quoted(line, lines, f"{path}: the row at byte {begin}")
        if fields and (len(fields) > 1 or fields[0].strip(" ")):  # pandas skips blank lines
            yield begin, fields


def _quoted(line: str, following: _Lines, where: str) -> list[str]:
    """The fields of a row with quotation marks, which may continue over several lines."""
    try:
        fields = next(csv.reader(chain((line,), following), delimiter="\t"))
    except csv.Error as error:
        hint = "; is a quotation mark not closed?" if "field limit" in str(error) else ""
        raise UserError(f"{where} cannot be read: {error}{hint}") from None
    if following.ended:  # the reader returns a complete row before it asks for another line
        raise UserError(f"{where} opens a quotation mark that is never closed")
    return fields


def _check_header(fields: Sequence[str], needed: Sequence[str], path: Path) -> None:
    """Raise UserError unless the header has every needed column once."""
    if not fields:
        raise UserError(f"{path}: the file is empty")
    for name in needed:
        if name not in fields:
            raise UserError(
                f"{path}: column {name!r} is missing{suggest(name, fields)}; the file has: "
                f"{', '.join(_short(field) for field in fields[:30])}"
            )
        if fields.count(name) > 1:
            raise UserError(f"{path}: there are two columns {name!r}")


def _resolved(rows: Mapping[str, TsvRow], references: Mapping[str, str], path: Path) -> list[TsvRow]:
    """The rows with the offset of their image, which any number of references may lead to."""
    resolved = []
    for row in rows.values():
        visited = [row.index]
        while visited[-1] in references:
            target = references[visited[-1]]
            where = _where(path, row.number, row.index, "image")
            if target not in rows:
                raise UserError(f"{where}: refers to index {_short(target)}, which no row with an image has")
            if target in visited:
                raise UserError(f"{where}: the references form a circle: {' -> '.join([*visited, target])}")
            visited.append(target)
        holder = rows[visited[-1]]
        resolved.append(replace(holder, number=row.number, index=row.index, cells=row.cells))
    return resolved


def _decoded(cell: str, where: str) -> tuple[bytes, ...]:
    """The files in a cell that is no reference. UserError, beginning with `where`, if it is neither base64 nor a list of it."""
    items = parse_list(cell, where) if cell.startswith("[") and cell.endswith("]") else [cell]
    if not items:
        raise UserError(f"{where}: an empty list of images")
    contents = []
    for number, item in enumerate(items, 1):
        try:
            # MIME encoders insert line breaks. Anything else is damage, which b64decode would ignore by default.
            contents.append(base64.b64decode(item.strip().replace("\r", "").replace("\n", ""), validate=True))
        except ValueError as error:
            place = "" if len(items) == 1 else f": image {number} of {len(items)}"
            raise UserError(f"{where}{place}: not base64: {error}") from None
    return tuple(contents)


def _where(path: Path, number: int, index: str, field: str) -> str:
    return f"{path}: row {number} (index {_short(index)}), field {field!r}"


def _short(text: str) -> str:
    return repr(text if len(text) <= REFERENCE_CHARS else f"{text[:REFERENCE_CHARS]}...")
