"""The journal of a run: every finished evaluation is one line on disk, and resuming is reading them back.

A run's folder holds `journal.jsonl`. Its first line is a header:

    {"schema": "rlens-journal", "version": 1, "fingerprint": {...}}

with whatever of the configuration decides the outcomes. Every other line is one evaluation, of one plan on
one dataset of one split, and is written once:

    {"split": "search", "attention": [6, 7], "ffn": [], "dataset": "doc", "outcomes": "5:b0", "seconds": 1.5}

`outcomes` holds the per-sample outcomes in the dataset's order: when all are 0 or 1 as "<count>:<hex>", where
the highest bit of the first byte is the first sample (so "5:b0" is 1 0 1 1 0), otherwise as a list of
numbers, each written so that the same float64 is read back.

Each line reaches the disk (one write, one fsync) before `append` returns. The folder's `journal.lock` is held
while the journal is open; the lock goes with the process, however that ends.

Of a run's processes the first opens and writes the journal; the others follow it: they read what it holds at the
start, and add to their memory the same evaluations that the first one writes.
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlens_jax.config import flat
from rlens_jax.errors import UserError
from rlens_jax.plan import Plan

SCHEMA = "rlens-journal"
VERSION = 1
JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "journal.lock"
_FIELDS = ("split", "attention", "ffn", "dataset", "outcomes", "seconds")

Key = tuple[str, Plan, str]


@dataclass(frozen=True)
class Record:
    """One evaluation: the outcomes of `plan` on the samples of `dataset` in `split`.

    Outcomes are finite float64 values, one a sample (or pair or group), in the dataset's order. `seconds` is
    the time the evaluation took and takes no part in any result.
    """

    split: str
    plan: Plan
    dataset: str
    outcomes: tuple[float, ...]
    seconds: float

    @property
    def key(self) -> Key:
        """What no two records of a journal share: (split, plan, dataset)."""
        return self.split, self.plan, self.dataset


class _Writer:
    """The journal's file, open for appending, and the folder's lock."""

    def __init__(self, path: Path, file: int, lock: int):
        self._path, self._file, self._lock = path, file, lock

    def write(self, line: bytes) -> None:
        """One whole line to the disk; UserError, and the file as before, when the disk does not take it."""
        length = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(0, "no space left for a whole line")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, length)
            raise UserError(f"cannot write to the journal {self._path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)


class Journal:
    """The finished evaluations of a run. Made by `Journal.open` or `Journal.follow`; a context manager.

    Attributes:
      path: the journal's file.
      repaired: what was cut off a torn last line when opening, as one line for the user; None if nothing was.
    """

    def __init__(
        self, path: Path, records: dict[Key, Record], writer: _Writer | None, repaired: str | None = None
    ):
        self.path = path
        self.repaired = repaired
        self._records = records
        self._writer = writer

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """Open the journal of a run's folder, both made when missing, and read what it holds.

        Args:
          folder: the run's folder.
          fingerprint: what of the configuration decides the outcomes; nested, of JSON values.

        Raises:
          UserError: when the folder cannot be written, another run holds it, it belongs to another
            configuration, or a line other than a torn last one cannot be read.
        """
        fingerprint, path = _as_stored(fingerprint), folder / JOURNAL_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
        try:
            if not path.exists():
                _write_header(path, fingerprint)
            records, length = _read(path, fingerprint)
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            torn = os.fstat(file).st_size - length
            repaired = None
            if torn:
                os.ftruncate(file, length)
                os.fsync(file)
                repaired = (
                    f"{path}: cut off an unfinished last line of {torn} bytes; "
                    f"{len(records)} finished evaluations are kept"
                )
        except OSError as error:
            os.close(lock)
            raise UserError(f"cannot use the journal {path}: {error.strerror}") from error
        except BaseException:
            os.close(lock)
            raise
        return cls(path, records, _Writer(path, file, lock), repaired)

    @classmethod
    def follow(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """The journal that another process of the same run has opened: read once, then kept in memory only.

        Takes no lock and never writes. `append` does all that it does in an open journal, save writing.

        Raises:
          UserError: when there is no journal in the folder, or as in `open` it belongs to another configuration
            or cannot be read.
        """
        path = folder / JOURNAL_NAME
        try:
            records, _ = _read(path, _as_stored(fingerprint))
        except OSError as error:
            raise UserError(f"cannot read the journal {path}: {error.strerror}") from error
        return cls(path, records, writer=None)

    def get(self, split: str, plan: Plan, dataset: str) -> Record | None:
        """The record of an evaluation, None when it has not been made."""
        return self._records.get((split, plan, dataset))

    def records(self) -> tuple[Record, ...]:
        """All records, in the order in which they were written."""
        return tuple(self._records.values())

    def append(self, record: Record) -> None:
        """Write one evaluation; it is on disk when this returns.

        Raises:
          ValueError: when the journal holds this evaluation already (nothing is ever evaluated twice), or an
            outcome is not a finite number.
          UserError: when the disk does not take it; the journal is then as before.
        """
        if record.key in self._records:
            raise ValueError(
                f"evaluated twice: {record.plan.label()} on {record.dataset}, split {record.split}"
            )
        line = _encode(record)
        if self._writer is not None:
            self._writer.write(line)
        self._records[record.key] = record

    def close(self) -> None:
        """Close the journal and let go of the folder."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock; UserError when another one does."""
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"another run is using {folder} (process {holder}); wait for it to end, or choose another folder"
        ) from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _as_stored(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of a fingerprint (lists for tuples), which is what a stored one is compared with."""
    return json.loads(json.dumps(fingerprint, allow_nan=False))


def _write_header(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Create the journal with its header, whole or not at all."""
    header = {"schema": SCHEMA, "version": VERSION, "fingerprint": fingerprint}
    unfinished = path.with_suffix(".new")
    try:
        with unfinished.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    # The new name is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, fingerprint: Mapping[str, Any]) -> tuple[dict[Key, Record], int]:
    """The journal's records, and the length in bytes of its finished lines."""
    with path.open("rb") as file:
        header, *lines = list(file) or [b""]
    _check_header(path, header, fingerprint)
    records: dict[Key, Record] = {}
    length = len(header)
    for number, line in enumerate(lines, start=2):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            record = _decode(line)
        except ValueError as error:
            # A crash tears the last line only, and its evaluation is made again.
            if number == len(lines) + 1 and not _is_object(line):
                break
            raise UserError(f"{path}, line {number} cannot be read ({error}); {_REMEDY}") from error
        if record.key in records:
            raise UserError(f"{path}, line {number} repeats the evaluation of an earlier line; {_REMEDY}")
        records[record.key] = record
        length += len(line)
    return records, length


_REMEDY = "restore the file, or delete the line to have its evaluation made again"


def _is_object(line: bytes) -> bool:
    """Whether a line is finished and some JSON object, so that no crash can have torn it."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_header(path: Path, line: bytes, fingerprint: Mapping[str, Any]) -> None:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA or not line.endswith(b"\n"):
        raise UserError(f"{path}, line 1 is not the header of a journal; choose another folder")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} has version {header.get('version')}, this program reads {VERSION}; choose another folder"
        )
    stored, now = flat(header.get("fingerprint")), flat(fingerprint)
    names = [*stored, *(name for name in now if name not in stored)]
    differences = [
        f"{name} was {stored.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in names
        if stored.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} belongs to a run of another configuration: {'; '.join(differences)}. "
            "Choose another folder, or set these fields back to resume that run"
        )


def _encode(record: Record) -> bytes:
    fields = {
        "split": record.split,
        "attention": list(record.plan.attention),
        "ffn": list(record.plan.ffn),
        "dataset": record.dataset,
        "outcomes": _packed(record.outcomes),
        "seconds": float(record.seconds),
    }
    return json.dumps(fields, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> Record:
    """The record of a line; ValueError, saying what is wrong, when it is none."""
    fields = json.loads(line)
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
    outcomes = _unpacked(fields["outcomes"])
    return Record(fields["split"], plan, fields["dataset"], outcomes, float(fields["seconds"]))


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
