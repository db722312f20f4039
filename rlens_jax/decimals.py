"""Exact decimals in user input: 0.1 means one tenth, not the nearest binary number."""

from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from rlens_jax.errors import UserError

UnitInterval = Literal["(0, 1]", "[0, 1)"]
_RANGES: dict[UnitInterval, str] = {"(0, 1]": "above 0 and at most 1", "[0, 1)": "at least 0 and below 1"}


def exact(decimal: float | str) -> Fraction:
    """The decimal as a fraction."""
    # The shortest text that reads back as this float is the decimal that the user wrote.
    return Fraction(str(decimal))


def checked_decimal(name: str, value: object, interval: UnitInterval) -> float:
    """The float that prints as the decimal `value`.

    Raises:
        UserError: naming `name`, if `value` is no decimal number, lies outside of `interval`, or has too many digits.
    """
    try:
        decimal = Decimal("nan") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        decimal = Decimal("nan")
    inside = decimal.is_finite() and 0 <= decimal <= 1 and decimal != (0 if interval == "(0, 1]" else 1)
    if not inside:
        raise UserError(f"{name} must be a decimal number {_RANGES[interval]}, not {value!r}")
    if exact(float(decimal)) != Fraction(decimal):
        raise UserError(f"{name} has more digits than a float keeps: {value!r}; write at most 15 digits")
    return float(decimal)
