"""The journal of a run: every finished evaluation is one line on disk, so resuming means reading them back.

`journal.jsonl` has the header of `rlens_jax.durable_log` and then one line per evaluation (`rlens_jax.search.record`).

Process 0 of a run opens and writes the journal. The other processes follow it: they read it at the start, and add to their
memory the evaluations that process 0 writes.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlens_jax.durable_log import LogKind, LogWriter, open_log, read_log
from rlens_jax.search.record import Key, Record, decode_record, encode_record


class Journal:
    """The finished evaluations of a run. Made by `Journal.open` or `Journal.follow`; a context manager.

    Attributes:
        repaired: a line for the user if a torn last line was cut off, else None.
    """

    def __init__(self, records: dict[Key, Record], writer: LogWriter | None, repaired: str | None = None):
        self.repaired = repaired
        self._records = records
        self._writer = writer

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """Open and read the journal of a run's folder, both made when missing; arguments and errors as of `open_log`."""
        return cls(*open_log(folder, _KIND, fingerprint))

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
        line = encode_record(record)
        if self._writer is not None:
            self._writer.write(line)
        self._records[record.key] = record

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


def _keyed(line: bytes) -> tuple[Key, Record]:
    record = decode_record(line)
    return record.key, record


_KIND = LogKind("rlens-journal", 1, "journal", "evaluation", _keyed)
JOURNAL_NAME = _KIND.file_name
