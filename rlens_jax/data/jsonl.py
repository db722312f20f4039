"""Samples from a user's JSON Lines file.

Each row is a sample:

    {"image": "a.png", "question": "How many?", "answer": "7", "dataset": "mine"}
    {"image": ["a.png", "b.png"], "question": "Is <image> in <image>?", "answers": ["no", "not"], ...}

Image paths are relative to the JSON Lines file. An optional "id" names the row. The format is our decision. Unknown
fields are errors, so that a misspelt field cannot change a ranking unnoticed.
"""

from pathlib import Path
from typing import Any

from rlens_jax.data.samples import IMAGE_MARK, Sample
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import parse_json, read_text

_FIELDS = ("image", "question", "answer", "answers", "dataset", "id")
_VIDEO_FIELDS = ("video", "videos")


def read_jsonl(path: Path) -> list[Sample]:
    """All rows of the file in order, without blank lines. UserError, naming file, line and field, for the first wrong row."""
    # Split at line feeds only: str.splitlines would also split at U+2028, which JSON strings may contain.
    lines = read_text(path).split("\n")
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        sample = _sample(_row(line, f"{path}:{number}"), path, number)
        if sample.id in line_of_id:
            raise UserError(f"{path}:{number}: field 'id': line {line_of_id[sample.id]} has the id {sample.id!r} already")
        line_of_id[sample.id] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: empty dataset: the file has no rows")
    return samples


def _row(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line. UserError for an unknown field."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {_type_name(row)}")
    for name in row:
        if name in _VIDEO_FIELDS:
            raise UserError(f"{where}: field {name!r}: videos are not supported, only images")
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown field {name!r}{suggest(name, _FIELDS)}; known fields: {', '.join(_FIELDS)}")
    return row


def _sample(row: dict[str, Any], path: Path, number: int) -> Sample:
    where = f"{path}:{number}"
    images = _images(row, path.parent, where)
    question = _text(row, "question", where)
    marks = question.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise UserError(
            f"{where}: field 'question' has {marks} {IMAGE_MARK} mark(s), but the row has {len(images)} "
            "image(s); use one mark per image, or none"
        )
    return Sample(
        id=_text(row, "id", where) if "id" in row else f"{path.name}:{number}",
        dataset=_text(row, "dataset", where),
        images=images,
        question=question,
        answers=_answers(row, where),
    )


def _images(row: dict[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    if "image" not in row or row["image"] == []:
        raise UserError(f"{where}: field 'image' is missing or empty: a prompt without an image has nothing to reduce")
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{where}: field 'image' must be a path or a list of paths, but has {_type_name(name)}")
        if not name.strip():
            raise UserError(f"{where}: field 'image' is an empty path")
        # A null character cannot be in a file name: is_file raises ValueError for it on Python 3.11.
        if "\0" in name or not (folder / name).is_file():
            raise UserError(f"{where}: field 'image': no such file: {folder / name}")
    return tuple(folder / name for name in names)


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    if "answer" in row and "answers" in row:
        raise UserError(f"{where}: has both fields 'answer' and 'answers'; keep one of them")
    if "answer" in row:
        return (_text(row, "answer", where),)
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
    return tuple(answers)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be a string, not {_type_name(value)}")
    if not value.strip():
        raise UserError(f"{where}: field {field!r} is empty")
    return value


def _type_name(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
