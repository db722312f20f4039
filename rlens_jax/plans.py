"""Which decoder layers are reduced (`Plan`), and how (`Reduction`): immutable, hashable values that all rooms share."""

import operator as operators
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, get_args, no_type_check

import numpy as np

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted

Operator = Literal["attention", "ffn"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

ProbeChoice = Literal["strided", "random"]
WindowChoice = Literal["ordinal", "position"]

UnitInterval = Literal["(0, 1]", "[0, 1)"]
MOST_LAYERS = 1000
"""Of any model and any list of layers: published decoders have up to 126."""
_LARGEST_RANGE = 2**31 - 1
"""Ordinals are int32."""
_MOST_DECIMALS = 330
"""No float is smaller than 5e-324."""
_RANGES: dict[UnitInterval, str] = {"(0, 1]": "above 0 and at most 1", "[0, 1)": "at least 0 and below 1"}


def exact(decimal: float | str) -> Fraction:
    """The decimal that the user wrote, as a fraction: 0.1 means one tenth, not the nearest binary number."""
    return Fraction(str(decimal))  # a float prints as the shortest decimal that reads back as this float


def checked_decimal(name: str, value: object, interval: UnitInterval) -> float:
    """The float that prints as the decimal `value`.

    Raises:
        UserError: naming `name`, if `value` is no decimal number, lies outside of `interval`, or has too many digits.
    """
    try:
        decimal = Decimal("nan") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        decimal = Decimal("nan")
    if not (decimal.is_finite() and 0 <= decimal <= 1 and decimal != (0 if interval == "(0, 1]" else 1)):
        raise UserError(f"{name} must be a decimal number {_RANGES[interval]}, not {quoted(value)}")
    # Fraction writes out all digits, of 1e-99999999 too.
    if len(str(value)) > _MOST_DECIMALS or decimal.adjusted() < -_MOST_DECIMALS or exact(float(decimal)) != Fraction(decimal):
        raise UserError(f"{name} has more digits than a float keeps: {quoted(value)}; write at most 15 digits")
    return float(decimal)


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class Reduction:
    """How a reduced layer treats its visual tokens (Hollow Attention and Probe-Activated Dynamic FFN).

    Both fractions are exact decimals, stored as the float that prints as that decimal. A value out of range raises UserError
    with the field's name.
    """

    attention_range: int = 256
    """R: how many visual tokens a visual token attends to, itself included (paper: 256; counting itself, and counting
    tokens rather than positions, is our decision)."""
    active_fraction: float | str = 0.2
    """Share of the FFN units that visual tokens keep, above 0 and at most 1 (paper: 20 %)."""
    probe_fraction: float | str = 0.1
    """Share of the visual tokens that are probes, above 0 and at most 1 (our decision: one tenth)."""
    probe: ProbeChoice = "strided"
    """How probes are chosen: `strided` takes the ordinals (i * P) // M (our decision), `random` draws them (paper)."""
    window: WindowChoice = "ordinal"
    """What the range counts: `ordinal` counts visual tokens, `position` counts absolute positions (as some ports do)."""

    def __post_init__(self) -> None:
        if type(self.attention_range) is not int or not 1 <= self.attention_range <= _LARGEST_RANGE:
            value = quoted(self.attention_range)
            raise UserError(f"attention_range must be a whole number from 1 to {_LARGEST_RANGE}, not {value}")
        for field in ("active_fraction", "probe_fraction"):
            object.__setattr__(self, field, checked_decimal(field, getattr(self, field), "(0, 1]"))
        for field, choices in (("probe", get_args(ProbeChoice)), ("window", get_args(WindowChoice))):
            value = getattr(self, field)
            if value not in choices:
                near = suggest(str(value), choices)
                raise UserError(f"{field} must be one of {', '.join(choices)}, not {quoted(value)}{near}")

    def probe_count(self, num_visual: int) -> int:
        """M, the number of probes of a sample with `num_visual` visual tokens; 0 if there are none."""
        return min(num_visual, max(1, num_visual * exact(self.probe_fraction) // 1))

    def probe_capacity(self, visual_slots: int) -> int:
        """The static number of probe slots for samples with at most `visual_slots` visual tokens."""
        return self.probe_count(visual_slots)  # M does not fall as the number of visual tokens grows

    def kept_units(self, ffn_width: int) -> int:
        """U, the number of units kept of `ffn_width`: rounded to the nearest whole number, halves up, at least 1."""
        return min(ffn_width, max(1, (ffn_width * exact(self.active_fraction) + Fraction(1, 2)) // 1))


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class Plan:
    """Which layers (0-based) have Hollow Attention, and which have the Dynamic FFN. `Plan()` is the dense model.

    Layers are accepted in any order and stored sorted. A layer that is repeated, negative or no whole number raises UserError.
    """

    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for operator in OPERATORS:
            object.__setattr__(self, operator, _checked_layers(operator, getattr(self, operator)))

    def layers(self, operator: Operator) -> tuple[int, ...]:
        """The layers in which `operator` is reduced, sorted."""
        return self.attention if operator == "attention" else self.ffn

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless the model's `num_layers` layers include all layers of the plan."""
        for operator in OPERATORS:
            highest = max(self.layers(operator), default=-1)
            if highest >= num_layers:
                raise UserError(
                    f"the plan reduces {operator} in layer {highest}, but the model has {num_layers} layers (0-{num_layers - 1})"
                )

    def flags(self, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
        """The plan as data: `(hollow, dynamic)`, two bool[L] arrays. Raises UserError as `validate` does."""
        self.validate(num_layers)
        hollow, dynamic = np.zeros(num_layers, bool), np.zeros(num_layers, bool)
        hollow[list(self.attention)] = True
        dynamic[list(self.ffn)] = True
        return hollow, dynamic

    def with_layer(self, operator: Operator, layer: int) -> "Plan":
        """This plan with one more reduced layer. Raises UserError if the plan reduces that layer already."""
        added = (*self.layers(operator), layer)
        return replace(self, attention=added) if operator == "attention" else replace(self, ffn=added)

    def lowest_difference(self, other: "Plan") -> int | None:
        """The lowest layer that the two plans treat differently (all layers below compute the same), None if they are equal."""
        differing = (set(self.attention) ^ set(other.attention)) | (set(self.ffn) ^ set(other.ffn))
        return min(differing, default=None)

    def runs(self, num_layers: int) -> list[tuple[int, int, bool, bool]]:
        """Maximal runs of layers with equal treatment, as `(start, stop, hollow, dynamic)`, stop excluded."""
        hollow, dynamic = self.flags(num_layers)
        treatment = list(zip(hollow.tolist(), dynamic.tolist(), strict=True))
        starts = [i for i in range(num_layers) if i == 0 or treatment[i] != treatment[i - 1]]
        stops = [*starts[1:], num_layers]
        return [(start, stop, *treatment[start]) for start, stop in zip(starts, stops, strict=True)]

    def label(self) -> str:
        """A short text for tables and messages: "attention 20-27, ffn 22+24-27", or "dense"."""
        parts = [f"{operator} {_spans(self.layers(operator))}" for operator in OPERATORS if self.layers(operator)]
        return ", ".join(parts) or "dense"


def _checked_layers(operator: Operator, layers: object) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise UserError(f"plan.{operator} must be a list of layer numbers, not {quoted(layers)}")
    checked: set[int] = set()
    for layer in layers:
        try:
            number = -1 if isinstance(layer, bool) else operators.index(layer)
        except TypeError:
            number = -1
        if number < 0:
            raise UserError(f"plan.{operator}: a layer must be a whole number, at least 0, not {quoted(layer)}")
        if number >= MOST_LAYERS:
            raise UserError(f"plan.{operator}: no model has a layer {number}")
        if number in checked:
            raise UserError(f"plan.{operator} names layer {number} twice")
        checked.add(number)
    return tuple(sorted(checked))


def _spans(layers: tuple[int, ...]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(starts, stops, strict=True)
    return "+".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in pairs)
