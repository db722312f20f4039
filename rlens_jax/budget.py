"""Budgets of the joint search: `loss=1%`, `flops=60%` or `time=0.7`."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted
from rlens_jax.plans import exact

BudgetKind = Literal["loss", "flops", "time"]
_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
_NUMBER = re.compile(r"\d{1,3}(\.\d{1,15})?|\.\d{1,15}", re.ASCII)
_FORM = "a budget has the form loss=1%, flops=60% or time=0.7"


@dataclass(frozen=True)
class Budget:
    """A budget: the largest loss, or the share of the dense prefill's FLOPs or time that is left. `share` is in (0, 1)."""

    kind: BudgetKind
    share: float

    def __str__(self) -> str:
        return f"{self.kind}={100 * self.share:g}%"


def parse_budget(text: str) -> Budget:
    """The budget that the user wrote. UserError for anything else, with what to write."""
    name, equals, amount = (part.strip() for part in text.partition("="))
    kind = next((known for known in _KINDS if known == name), None)
    if kind is None or not equals:
        raise UserError(f"{_FORM}, not {quoted(text)}{suggest(name, _KINDS)}")
    number, percent = amount.removesuffix("%").strip(), amount.endswith("%")
    if not _NUMBER.fullmatch(number):
        unit = "; it is a share of the dense prefill, without another unit" if number[:1].isdigit() else ""
        raise UserError(f"budget {quoted(text)}: {quoted(amount)} is no number{unit}; {_FORM}")
    value = exact(number) / (100 if percent else 1)
    if not 0 < value < 1:
        near = f"; for per cent, write {kind}={number}%" if not percent and 1 <= value < 100 else ""
        raise UserError(f"budget {quoted(text)}: the share must be above 0 and below 1{near}")
    return Budget(kind, float(value))
