"""Samples from a user's JSON Lines file.

Each row is a sample:

    {"image": "a.png", "question": "How many?", "answer": "7", "dataset": "mine"}
    {"images": ["a.png", "b.png"], "question": "Is <image> in <image>?", "marks": true, "answers": ["no", "not"], ...}

- `image`, or `images` (either takes one path or a list): relative to the JSON Lines file.
- `question`: the user's text, as it is.
- `answer`, or `answers` (a list): without white space at the ends and in Unicode's composed form (`samples.normalised`). A number
  is its text as written: 1.0 is "1.0".
- `dataset`: a name.
- `marks`: if true, each "<image>" in the question is the place of an image. Otherwise it is text, and the images come first.
- `id`: names the row in messages and results.

The format is our decision. Unknown fields are errors, so that a misspelt field cannot change a ranking unnoticed. Videos are not
supported: a row with a field or a part of a chat that holds one is an error.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlens_jax.console import say
from rlens_jax.data.images import image_file
from rlens_jax.data.samples import IMAGE_MARK, VIDEO_MARK, Sample, normalised
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import LARGEST_TEXT, open_file, parse_json, quoted
from rlens_jax.mirrors import address_of, fetched, fetched_files

_FIELDS = ("image", "images", "question", "answer", "answers", "dataset", "marks", "id")
_VIDEO_PREFIX = "video"
"""Of the names of fields that hold videos in other formats."""
_BYTE_ORDER_MARK = "\ufeff".encode()


class _Number(str):
    """The text of a number."""


def read_jsonl(path: Path) -> list[Sample]:
    """All rows of the file in order, without blank lines. UserError, naming file, line and field, for the first wrong row."""
    _fetch(path)
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    for number, line in _lines(path):
        sample = _sample(_row(line, f"{path}:{number}"), path, number)
        if sample.id in line_of_id:
            name = quoted(sample.id)
            raise UserError(f"{path}:{number}: field 'id': line {line_of_id[sample.id]} has the id {name} already")
        line_of_id[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: empty dataset: the file has no rows")
    if unmarked := sum(IMAGE_MARK in sample.question and not sample.marked for sample in samples):
        say(f'note: {path}: {IMAGE_MARK} is text in {unmarked} question(s); "marks": true makes it the place of an image')
    if videos := sum(VIDEO_MARK in sample.question for sample in samples):
        say(f"note: {path}: {VIDEO_MARK} is text in {videos} question(s); videos are not supported, only images")
    return samples


def _fetch(path: Path) -> None:
    """Download the file, and the images that it names, if the path stands for an address."""
    if address_of(fetched(path)) is None:
        return
    names: dict[str, None] = {}
    for _, line in _lines(path):
        with suppress(ValueError):  # `_row` says what is wrong
            row = json.loads(line)
            fields = [row[name] for name in ("image", "images") if name in row] if isinstance(row, dict) else []
            for field in fields:
                names |= {name: None for name in (field if isinstance(field, list) else [field]) if isinstance(name, str)}
    # As the file system reads a name with `..`; a store takes it literally.
    fetched_files([Path(os.path.normpath(path.parent / name)) for name in names if "\0" not in name])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not blank."""
    with open_file(path) as file:
        number = 0
        try:
            while line := file.readline(LARGEST_TEXT + 1):
                number += 1
                if len(line) > LARGEST_TEXT:
                    raise UserError(f"{path}:{number}: a line is longer than {LARGEST_TEXT:,} bytes; is this a JSON Lines file?")
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. UserError for an unknown field."""
    row = parse_json(line, where, number=_Number)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {_type_name(row)}")
    for name, value in row.items():
        if name.startswith(_VIDEO_PREFIX) or _has_video(value):
            raise UserError(f"{where}: field {name!r}: videos are not supported, only images")
        if name not in _FIELDS:
            unknown = quoted(name)
            raise UserError(f"{where}: unknown field {unknown}{suggest(name, _FIELDS)}; known fields: {', '.join(_FIELDS)}")
    return row


def _has_video(value: Any) -> bool:
    """Whether a value, such as the content of a chat, has a part of the type video."""
    waiting = [value]
    while waiting:  # no recursion: JSON may be nested deeper than Python's stack
        part = waiting.pop()
        if isinstance(part, dict):
            kind = part.get("type")
            if isinstance(kind, str) and kind.startswith(_VIDEO_PREFIX):
                return True
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return False


def _sample(row: dict[str, Any], path: Path, number: int) -> Sample:
    where = f"{path}:{number}"
    images = _images(row, path.parent, where)
    question = _text(row, "question", where)
    marked = row.get("marks", False)
    if not isinstance(marked, bool):
        raise UserError(f"{where}: field 'marks' must be true or false, not {_type_name(marked)}")
    if marked and VIDEO_MARK in question:
        raise UserError(f"{where}: field 'question' has the mark {VIDEO_MARK}: videos are not supported, only images")
    marks = question.count(IMAGE_MARK)
    if marked and marks != len(images):
        raise UserError(
            f"{where}: field 'question' has {marks} {IMAGE_MARK} mark(s), but the row has {len(images)} "
            "image(s); use one mark per image, or leave out the field 'marks'"
        )
    return Sample(
        id=_text(row, "id", where) if "id" in row else f"{path.name}:{number}",
        dataset=_text(row, "dataset", where),
        images=images,
        question=question,
        answers=_answers(row, where),
        marked=marked,
    )


def _images(row: dict[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    if "image" in row and "images" in row:
        raise UserError(f"{where}: has both fields 'image' and 'images'; keep one of them")
    field = "images" if "images" in row else "image"
    if row.get(field, []) == []:
        raise UserError(
            f"{where}: field 'image' (or 'images') is missing or empty: a prompt without an image has nothing to reduce"
        )
    names = row[field] if isinstance(row[field], list) else [row[field]]
    for name in names:
        if type(name) is not str:
            raise UserError(f"{where}: field {field!r} must be a path or a list of paths, but has {_type_name(name)}")
        if not name.strip():
            raise UserError(f"{where}: field {field!r} is an empty path")
    return tuple(image_file(name, folder, f"{where}: field {field!r}") for name in names)


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answer" in row and "answers" in row:
        raise UserError(f"{where}: has both fields 'answer' and 'answers'; keep one of them")
    if "answer" in row:
        if isinstance(row["answer"], _Number):
            return (str(row["answer"]),)
        return (normalised(_text(row, "answer", where)),)
    if "answers" not in row:
        raise UserError(f"{where}: field 'answer' (or 'answers') is missing")
    answers = row["answers"]
    if not isinstance(answers, list):
        raise UserError(f"{where}: field 'answers' must be a list of strings, not {_type_name(answers)}")
    if not answers:
        raise UserError(f"{where}: field 'answers' is empty")
    for answer in answers:
        if not isinstance(answer, str):
            raise UserError(f"{where}: field 'answers' must be a list of strings, but has {_type_name(answer)}")
        if not answer.strip():
            raise UserError(f"{where}: field 'answers' has an empty answer")
    return tuple(dict.fromkeys(map(normalised, answers)))


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: field {field!r} is missing")
    value = row[field]
    if type(value) is not str:
        raise UserError(f"{where}: field {field!r} must be a string, not {_type_name(value)}")
    if not value.strip():
        raise UserError(f"{where}: field {field!r} is empty")
    return value


def _type_name(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
