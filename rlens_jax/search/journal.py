"""The journal of a run: every finished step is one line on disk, so resuming means reading them back.

`journal.jsonl` has the header of `rlens_jax.durable_log` and then one line per step of a plan:

    {"split": "test", "attention": [6, 7], "ffn": [], "samples": [0, 3, 4, 9, 2], "outcomes": "5:b0", "seconds": 1.5}

`samples` holds numbers of samples in the split, `outcomes` their outcomes in the same order. If all are 0 or 1 it is
"<count>:<hex>", and the highest bit of the first byte is the first sample ("5:b0" is 1 0 1 1 0); else it is a list of numbers
that read back as the same float64.

Process 0 of a run opens and writes the journal. The other processes follow it: they read it at the start, and add to their
memory the steps that process 0 writes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlens_jax.durable_log import LogKind, LogWriter, check_free, open_log, read_log
from rlens_jax.errors import UserError
from rlens_jax.plans import LEVEL_FIELDS, Plan

MOST_SAMPLES = 10**7
"""Samples of a split; a larger number in a journal is damage."""


@dataclass(frozen=True)
class Record:
    """The outcomes of `plan` on some samples of `split`, each a finite float64.

    Attributes:
        samples: the numbers of the samples in the split, at least one, each once.
        outcomes: one per sample, in the same order.
        seconds: the time that they took; no result uses it.
    """

    split: str
    plan: Plan
    samples: Sequence[int] | np.ndarray
    outcomes: Sequence[float] | np.ndarray
    seconds: float


class Journal:
    """The outcomes that a run has so far. Made by `Journal.open` or `Journal.follow`; a context manager.

    Attributes:
        num_outcomes: the number of outcomes, each of one sample under one plan.
        repaired: a line for the user if a torn last line was cut off or another run's journal was renamed, else None.
    """

    def __init__(self, folder: Path, records: Iterable[Record], writer: LogWriter | None, repaired: str | None = None):
        self.repaired = repaired
        self.num_outcomes = 0
        self._path = folder / JOURNAL_NAME
        self._outcomes: dict[tuple[str, Plan], np.ndarray] = {}  # NaN for unknown samples
        self._writer = writer
        for line, record in enumerate(records, start=2):
            try:
                self._enter(record)
            except ValueError as error:
                raise UserError(f"{self._path}, line {line} {error}; restore the file, or delete the line") from error

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise UserError if another run is writing the journal of this folder."""
        check_free(folder, _KIND)

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> "Journal":
        """Open and read the journal of a run's folder, both made when missing; arguments and errors as of `open_log`."""
        records, writer, repaired = open_log(folder, _KIND, fingerprint, restart=restart)
        try:
            return cls(folder, records.values(), writer, repaired)
        except UserError:
            writer.close()
            raise

    @classmethod
    def follow(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """The journal that another process of the run has opened: read once, then kept in memory; errors as of `read_log`."""
        return cls(folder, read_log(folder, _KIND, fingerprint).values(), writer=None)

    def outcomes(self, split: str, plan: Plan, count: int) -> np.ndarray:
        """The outcomes of a plan on the `count` samples of a split: float64[count], NaN where unknown.

        Raises:
            UserError: the journal has a sample that the split has not.
        """
        known = self._outcomes.get((split, plan), np.empty(0))
        if len(known) > count:
            raise UserError(
                f"{self._path}: sample {len(known) - 1} of the split {split} under the plan {plan.label()}, but the split has "
                f"{count} samples; restore the file, or delete the line"
            )
        return np.concatenate([known, np.full(count - len(known), np.nan)])

    def append(self, record: Record) -> None:
        """Write the outcomes of a step; they are on disk when this returns.

        Raises:
            ValueError: the journal has one of these samples under this plan already, or the record contradicts itself.
            UserError: it cannot be written; the journal is then as before.
        """
        line = _encoded(record)
        self._check_new(record)
        if self._writer is not None:
            self._writer.write(line)
        self._enter(record)

    def _check_new(self, record: Record) -> None:
        known = self._outcomes.get((record.split, record.plan), np.empty(0))
        again = [number for number in record.samples if number < len(known) and not np.isnan(known[number])]
        if again:
            where = f"split {record.split}, plan {record.plan.label()}"
            raise ValueError(f"repeats the evaluation of sample {again[0]} ({where})")

    def _enter(self, record: Record) -> None:
        self._check_new(record)
        key, length = (record.split, record.plan), max(record.samples) + 1
        known = self._outcomes.get(key, np.empty(0))
        known = np.concatenate([known, np.full(max(0, length - len(known)), np.nan)])
        known[np.asarray(record.samples)] = record.outcomes
        self._outcomes[key] = known
        self.num_outcomes += len(record.samples)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


_FIELDS = ("split", "attention", "ffn", "samples", "outcomes", "seconds")


def _encoded(record: Record) -> bytes:
    samples, outcomes = np.asarray(record.samples).tolist(), np.asarray(record.outcomes, np.float64)
    _check(samples, outcomes)
    packed: str | list[float] = outcomes.tolist()
    if np.isin(outcomes, (0.0, 1.0)).all():
        packed = f"{len(outcomes)}:{np.packbits(outcomes == 1.0).tobytes().hex()}"
    values = {"samples": samples, "outcomes": packed, "seconds": float(record.seconds)}
    return json.dumps({"split": record.split, **record.plan.fields(), **values}, allow_nan=False).encode() + b"\n"


def _decoded(fields: Any) -> tuple[tuple[str, Plan, int], Record]:
    """The record of a line, and a key that two lines have only if they overlap."""
    if not isinstance(fields, dict) or fields.keys() - set(LEVEL_FIELDS) != set(_FIELDS):
        raise ValueError(f"not exactly the fields {', '.join(_FIELDS)}")
    if not isinstance(fields["split"], str):
        raise ValueError("split must be a text")
    if isinstance(fields["seconds"], bool) or not isinstance(fields["seconds"], int | float):
        raise ValueError("seconds must be a number")
    if not isinstance(fields["samples"], list):
        raise ValueError("samples must be a list")
    try:
        plan = Plan.from_fields(fields)
    except UserError as error:
        raise ValueError(str(error)) from error
    outcomes = _unpacked(fields["outcomes"])
    _check(fields["samples"], outcomes)
    samples = np.array(fields["samples"])
    return (fields["split"], plan, int(samples[0])), Record(fields["split"], plan, samples, outcomes, float(fields["seconds"]))


def _check(samples: list[Any], outcomes: np.ndarray) -> None:
    if any(type(number) is not int or not 0 <= number < MOST_SAMPLES for number in samples):
        raise ValueError(f"samples must be whole numbers from 0 to {MOST_SAMPLES - 1}")
    if len(set(samples)) < len(samples):
        raise ValueError("samples names a sample twice")
    if not len(outcomes) or not np.isfinite(outcomes).all():
        raise ValueError("outcomes must be finite numbers, at least one")
    if len(samples) != len(outcomes):
        raise ValueError(f"{len(samples)} samples have {len(outcomes)} outcomes")


def _unpacked(packed: Any) -> np.ndarray:
    if isinstance(packed, list):
        if any(type(value) not in (int, float) for value in packed):
            raise ValueError("outcomes must be finite numbers, at least one")
        return np.array(packed, np.float64)
    count_text, _, digits = str(packed).partition(":")
    count, bits = int(count_text), np.frombuffer(bytes.fromhex(digits), np.uint8)
    if count < 1 or len(bits) != (count + 7) // 8:
        raise ValueError(f"outcomes {packed!r} do not hold the number they announce")
    return np.unpackbits(bits, count=count).astype(np.float64)


_KIND = LogKind("rlens-journal", 2, "journal", "step", _decoded)
JOURNAL_NAME = _KIND.file_name
