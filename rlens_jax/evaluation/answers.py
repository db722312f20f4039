"""The answers of an evaluation on disk: the log `answers.jsonl`, and files of predictions for VLMEvalKit.

The log has one line per answer, and every batch is written before the next is computed:

    {"variant": "plan", "dataset": "MME", "index": "12", "question": "5f1c...", "text": "Yes", "tokens": 2, "ended": true,
     "prompt": [37, 1792], "row": [21, 6]}

`question` identifies the question (`question_hash`): an answer is used again as long as the data have this question, at whatever
place. `prompt` holds the numbers of text and visual tokens; `row` says how many of the text tokens were shared, and by how many
questions. `rlens_jax.durable_log` describes the header and the state after a crash.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlens_jax.data.samples import Sample
from rlens_jax.durable_log import LogKind, LogWriter, open_log
from rlens_jax.evaluation.datasets import Dataset
from rlens_jax.files import replace_file

Key = tuple[str, str, str]
"""Variant, dataset, question hash."""


@dataclass(frozen=True)
class LoggedAnswer:
    """The answer to a question under a variant."""

    variant: str
    """Either "plan" or "dense"."""
    dataset: str
    index: str
    """The question's index when it was answered."""
    question: str
    text: str
    tokens: int
    """Number of new tokens, including the one that ends the turn."""
    ended: bool
    """Whether the model ended its turn."""
    prompt: tuple[int, int]
    """Numbers of text and visual tokens."""
    row: tuple[int, int]
    """Text tokens of the trunk of its row, and the number of questions in the row."""

    @property
    def key(self) -> Key:
        return self.variant, self.dataset, self.question


class Answers:
    """An open, locked log of answers. Made by `Answers.open`; a context manager."""

    def __init__(self, items: dict[Key, LoggedAnswer], writer: LogWriter, repaired: str | None):
        self.repaired = repaired
        self._items, self._writer = items, writer

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> "Answers":
        """Open the log in a folder, which is made if missing; arguments and errors as of `durable_log.open_log`.

        `fingerprint` identifies all that determines the answers.
        """
        return cls(*open_log(folder, _KIND, fingerprint, restart=restart))

    def __contains__(self, key: Key) -> bool:
        return key in self._items

    def get(self, key: Key) -> LoggedAnswer | None:
        """An answer, if there is one."""
        return self._items.get(key)

    def append(self, answers: Sequence[LoggedAnswer]) -> None:
        """Write new answers; they are on disk when this returns."""
        assert not any(answer.key in self for answer in answers)
        lines = [json.dumps(dataclasses.asdict(answer)).encode() + b"\n" for answer in answers]
        self._writer.write(b"".join(lines))
        self._items |= {answer.key: answer for answer in answers}

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()


def _keyed(fields: Any) -> tuple[Key, LoggedAnswer]:
    known = {field.name for field in dataclasses.fields(LoggedAnswer)}
    if not isinstance(fields, dict) or fields.keys() != known:
        raise ValueError(f"not exactly the fields {', '.join(sorted(known))}")
    for name in (pairs := ("prompt", "row")):
        if not isinstance(fields[name], list) or [type(number) for number in fields[name]] != [int, int]:
            raise ValueError(f"{name} must be two whole numbers")
    answer = LoggedAnswer(**{**fields, **{name: tuple(fields[name]) for name in pairs}})
    for name, kind in (("variant", str), ("dataset", str), ("index", str), ("question", str), ("text", str), ("tokens", int)):
        if type(getattr(answer, name)) is not kind:
            raise ValueError(f"{name} is not a {kind.__name__}")
    if type(answer.ended) is not bool:
        raise ValueError("ended is not true or false")
    return answer.key, answer


_KIND = LogKind("rlens-answers", 3, "answers", "answer", _keyed)
FILE_NAME = _KIND.file_name


def question_hash(sample: Sample, images: Hashable) -> str:
    """SHA-256, in hex, of all of a sample that a model reads; `images` is its `data.images.images_key`."""
    text = f"{sample.marked}, {images}, {len(sample.question)}: {sample.question}{sample.conversation}"
    return hashlib.sha256(text.encode()).hexdigest()


def write_predictions(path: Path, dataset: Dataset, predictions: Sequence[str | None]) -> None:
    """Write predictions as a TSV file that VLMEvalKit reads and scores; the folder is made if missing.

    One row per question: the columns of the dataset's own file without the image, then `prediction`; quoted as pandas quotes.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    for place, prediction in enumerate(predictions):
        row = dataset.columns(place)
        if place == 0:
            writer.writerow([*row, "prediction"])
        writer.writerow([*row.values(), prediction or ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue().encode())
