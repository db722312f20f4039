"""One finished evaluation, and the line that a journal keeps of it.

    {"split": "search", "attention": [6, 7], "ffn": [], "dataset": "doc", "outcomes": "5:b0", "seconds": 1.5}

`outcomes` holds the per-sample outcomes in the dataset's order. If all are 0 or 1 it is "<count>:<hex>", and the highest bit of
the first byte is the first sample ("5:b0" is 1 0 1 1 0); else it is a list of numbers that read back as the same float64.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.plan import Plan

_FIELDS = ("split", "attention", "ffn", "dataset", "outcomes", "seconds")

Key = tuple[str, Plan, str]


@dataclass(frozen=True)
class Record:
    """One evaluation: the outcomes of `plan` on the samples of `dataset` in `split`.

    Outcomes are finite float64 values, one per sample (or pair or group), in the dataset's order. No result uses `seconds`, the
    time that the evaluation took.
    """

    split: str
    plan: Plan
    dataset: str
    outcomes: tuple[float, ...]
    seconds: float

    @property
    def key(self) -> Key:
        """Unique in a journal."""
        return self.split, self.plan, self.dataset


def encode_record(record: Record) -> bytes:
    """The line of a record."""
    fields = {
        "split": record.split,
        "attention": list(record.plan.attention),
        "ffn": list(record.plan.ffn),
        "dataset": record.dataset,
        "outcomes": _packed(record.outcomes),
        "seconds": float(record.seconds),
    }
    return json.dumps(fields, allow_nan=False).encode() + b"\n"


def decode_record(line: bytes) -> Record:
    """The record of a line; ValueError, saying what is wrong, if it has none."""
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
