"""What is measured of each method of a comparison, on disk: the log `measurements.jsonl`, one line per finished method.

A line has the method's key, its name, the times of `evaluation.Times` (dense and `plan` took turns), and its peak memory.
`rlens_jax.durable_log` describes the header and the state after a crash.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from rlens_jax.durable_log import LogKind, LogWriter, open_log
from rlens_jax.engine.peak_memory import PeakMemory, Source
from rlens_jax.evaluation.evaluation import Times, VariantTime


@dataclass(frozen=True)
class Measured:
    """Times and memory of a method."""

    key: str
    name: str
    times: Times
    peak: PeakMemory


class Measurements:
    """An open, locked log of measurements. Made by `Measurements.open`; a context manager."""

    def __init__(self, items: dict[str, Measured], writer: LogWriter, repaired: str | None):
        self.repaired = repaired
        self._items, self._writer = items, writer

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> "Measurements":
        """Open the log in a folder, which is made if missing; arguments and errors as of `durable_log.open_log`."""
        return cls(*open_log(folder, _KIND, fingerprint, restart=restart))

    def get(self, key: str) -> Measured | None:
        """The measurement of a method, if there is one."""
        return self._items.get(key)

    def append(self, measured: Measured) -> None:
        """Write a measurement; it is on disk when this returns."""
        self._writer.write(json.dumps(dataclasses.asdict(measured)).encode() + b"\n")
        self._items[measured.key] = measured

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()


def _keyed(fields: Any) -> tuple[str, Measured]:
    times, peak = (_object(fields, name, kind) for name, kind in (("times", Times), ("peak", PeakMemory)))
    variants = {name: VariantTime(**_seconds(_object(times, name, VariantTime))) for name in ("dense", "plan")}
    for name in times.keys() - variants.keys():
        if type(times[name]) is not int or times[name] < 1:
            raise ValueError(f"times.{name} is no count")
    if peak["source"] not in get_args(Source) or type(peak["bytes"]) is not int:
        raise ValueError("peak is no number of bytes with its source")
    if fields.keys() != {"key", "name", "times", "peak"} or not all(isinstance(fields[name], str) for name in ("key", "name")):
        raise ValueError("not exactly key, name, times and peak")
    return fields["key"], Measured(fields["key"], fields["name"], Times(**{**times, **variants}), PeakMemory(**peak))


def _object(fields: Any, name: str, kind: type[Any]) -> dict[str, Any]:
    """The fields of an object in `fields`; ValueError unless they are those of the dataclass `kind`."""
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, dict) or value.keys() != {item.name for item in dataclasses.fields(kind)}:
        raise ValueError(f"{name} has not exactly the fields of a {kind.__name__}")
    return value


def _seconds(fields: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    if not all(isinstance(part, list) and part and all(type(value) is float for value in part) for part in fields.values()):
        raise ValueError("times are lists of seconds")
    return {name: tuple(part) for name, part in fields.items()}


_KIND = LogKind("rlens-measurements", 1, "measurements", "measurement", _keyed)
