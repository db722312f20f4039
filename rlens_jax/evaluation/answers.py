"""The answers of an evaluation on disk: `answers.jsonl`, a line an answer, written before the next batch is computed.

    {"variant": "plan", "dataset": "MME", "index": "12", "text": "Yes", "tokens": 2, "ended": true, "prompt": [37, 1792]}

`prompt` holds the numbers of text and visual tokens. See `rlens_jax.durable_log` for the header and for what a crash leaves.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlens_jax.durable_log import LogKind, LogWriter, open_log

Key = tuple[str, str, str]
"""Variant, dataset, index."""


@dataclass(frozen=True)
class LoggedAnswer:
    """An answer and what was asked.

    Attributes:
        variant: "plan" or "dense".
        dataset: its name.
        index: of the question.
        text: what the model said.
        tokens: new tokens, the one that ends the turn included.
        ended: whether the model ended its turn.
        prompt: numbers of text and visual tokens.
    """

    variant: str
    dataset: str
    index: str
    text: str
    tokens: int
    ended: bool
    prompt: tuple[int, int]

    @property
    def key(self) -> Key:
        return self.variant, self.dataset, self.index


class Answers:
    """An open, locked log of answers. Made by `Answers.open`; a context manager."""

    def __init__(self, items: dict[Key, LoggedAnswer], writer: LogWriter, repaired: str | None):
        self.repaired = repaired
        self._items, self._writer = items, writer

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Answers":
        """The answers in a folder, made when missing; UserError as `durable_log.open_log`.

        Args:
            folder: of the evaluation.
            fingerprint: what decides the answers: model, plan, data and settings.
        """
        return cls(*open_log(folder, _KIND, fingerprint))

    def __contains__(self, key: Key) -> bool:
        return key in self._items

    def __getitem__(self, key: Key) -> LoggedAnswer:
        return self._items[key]

    def append(self, answers: Sequence[LoggedAnswer]) -> None:
        """Write answers, none of which is there yet; they are on disk when this returns."""
        assert not any(answer.key in self for answer in answers)
        lines = [json.dumps(dataclasses.asdict(answer)).encode() + b"\n" for answer in answers]
        self._writer.write(b"".join(lines))
        self._items |= {answer.key: answer for answer in answers}

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def _keyed(line: bytes) -> tuple[Key, LoggedAnswer]:
    fields = json.loads(line)
    known = {field.name for field in dataclasses.fields(LoggedAnswer)}
    if not isinstance(fields, dict) or fields.keys() != known:
        raise ValueError(f"not exactly the fields {', '.join(sorted(known))}")
    prompt = fields["prompt"]
    if not isinstance(prompt, list) or [type(number) for number in prompt] != [int, int]:
        raise ValueError("prompt must be two whole numbers")
    answer = LoggedAnswer(**{**fields, "prompt": tuple(prompt)})
    for name, kind in (("variant", str), ("dataset", str), ("index", str), ("text", str), ("tokens", int)):
        if type(getattr(answer, name)) is not kind:
            raise ValueError(f"{name} is not a {kind.__name__}")
    if type(answer.ended) is not bool:
        raise ValueError("ended is not true or false")
    return answer.key, answer


_KIND = LogKind("rlens-answers", 1, "answers", "answer", _keyed)
FILE_NAME = _KIND.file_name
