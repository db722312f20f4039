"""The journal of a run: every finished evaluation is one line on disk, so resuming means reading them back.

`journal.jsonl` has the header of `rlens_jax.durable_log` and then one line per evaluation:

    {"split": "search", "attention": [6, 7], "ffn": [], "dataset": "doc", "outcomes": "5:b0", "seconds": 1.5}

`outcomes` holds the per-sample outcomes in the dataset's order. If all are 0 or 1 it is "<count>:<hex>", and the highest bit of
the first byte is the first sample ("5:b0" is 1 0 1 1 0); else it is a list of numbers that read back as the same float64.

Process 0 of a run opens and writes the journal. The other processes follow it: they read it at the start, and add to their
memory the evaluations that process 0 writes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlens_jax.durable_log import LogKind, LogWriter, check_free, open_log, read_log
from rlens_jax.errors import UserError
from rlens_jax.plan import Plan

Key = tuple[str, Plan, str]
"""Split, plan and dataset of an evaluation; unique in a journal."""


@dataclass(frozen=True)
class Record:
    """One evaluation: the outcomes of `plan` on the samples of `dataset` in `split`.

    Outcomes are finite float64 values, one per sample (or pair or group). No result uses `seconds`, the time that the
    evaluation took.
    """

    split: str
    plan: Plan
    dataset: str
    outcomes: tuple[float, ...]
    seconds: float

    @property
    def key(self) -> Key:
        return self.split, self.plan, self.dataset


class Journal:
    """The finished evaluations of a run. Made by `Journal.open` or `Journal.follow`; a context manager.

    Attributes:
        repaired: a line for the user if a torn last line was cut off or another run's journal was renamed, else None.
    """

    def __init__(self, records: dict[Key, Record], writer: LogWriter | None, repaired: str | None = None):
        self.repaired = repaired
        self._records = records
        self._writer = writer

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise UserError if another run is writing the journal of this folder."""
        check_free(folder, _KIND)

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> "Journal":
        """Open and read the journal of a run's folder, both made when missing; arguments and errors as of `open_log`."""
        return cls(*open_log(folder, _KIND, fingerprint, restart=restart))

    @classmethod
    def follow(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """The journal that another process of the run has opened: read once, then kept in memory; errors as of `read_log`."""
        return cls(read_log(folder, _KIND, fingerprint), writer=None)

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __getitem__(self, key: Key) -> Record:
        return self._records[key]

    def records(self) -> tuple[Record, ...]:
        """All records, in the order in which they were written."""
        return tuple(self._records.values())

    def append(self, record: Record) -> None:
        """Write one evaluation; it is on disk when this returns.

        Raises:
            ValueError: the journal has this evaluation already, or an outcome is not a finite number.
            UserError: it cannot be written; the journal is then as before.
        """
        if record.key in self._records:
            raise ValueError(f"evaluated twice: {record.plan.label()} on {record.dataset}, split {record.split}")
        line = _encoded(record)
        if self._writer is not None:
            self._writer.write(line)
        self._records[record.key] = record

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


_FIELDS = ("split", "attention", "ffn", "dataset", "outcomes", "seconds")


def _encoded(record: Record) -> bytes:
    outcomes, plan = _packed(record.outcomes), record.plan
    values = (record.split, plan.attention, plan.ffn, record.dataset, outcomes, float(record.seconds))
    return json.dumps(dict(zip(_FIELDS, values, strict=True)), allow_nan=False).encode() + b"\n"


def _decoded(fields: Any) -> tuple[Key, Record]:
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        raise ValueError(f"not exactly the fields {', '.join(_FIELDS)}")
    if not (isinstance(fields["split"], str) and isinstance(fields["dataset"], str)):
        raise ValueError("split and dataset must be texts")
    if isinstance(fields["seconds"], bool) or not isinstance(fields["seconds"], int | float):
        raise ValueError("seconds must be a number")
    try:
        plan = Plan(fields["attention"], fields["ffn"])
    except UserError as error:
        raise ValueError(str(error)) from error
    record = Record(fields["split"], plan, fields["dataset"], _unpacked(fields["outcomes"]), float(fields["seconds"]))
    return record.key, record


def _packed(outcomes: tuple[float, ...]) -> str | list[float]:
    values = [float(outcome) for outcome in outcomes]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError("outcomes must be finite numbers, at least one")
    if all(value in (0.0, 1.0) for value in values):
        return f"{len(values)}:{np.packbits([value == 1.0 for value in values]).tobytes().hex()}"
    return values


def _unpacked(packed: Any) -> tuple[float, ...]:
    if isinstance(packed, list):
        if not packed or any(type(value) not in (int, float) or not math.isfinite(value) for value in packed):
            raise ValueError("outcomes must be finite numbers, at least one")
        return tuple(float(value) for value in packed)
    count_text, _, digits = str(packed).partition(":")
    count, bits = int(count_text), np.frombuffer(bytes.fromhex(digits), np.uint8)
    if count < 1 or len(bits) != (count + 7) // 8:
        raise ValueError(f"outcomes {packed!r} do not hold the number they announce")
    return tuple(np.unpackbits(bits, count=count).astype(float).tolist())


_KIND = LogKind("rlens-journal", 1, "journal", "evaluation", _decoded)
JOURNAL_NAME = _KIND.file_name
