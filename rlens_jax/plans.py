"""What decoder layers do for visual tokens (`Plan`), and how (`Reduction`): immutable, hashable values that all rooms share."""

import operator as operators
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final, Literal, get_args, no_type_check

import numpy as np

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted

Operator = Literal["attention", "ffn"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

FULL: Final = "full"
"""The dense operator."""
STANDARD: Final = "standard"
"""The reduced operator of the paper, with the `attention_range` or the `active_fraction` of the `Reduction`."""
TEXT: Final = 0
"""Attention range 0: a visual token attends to the text before it only, not even to itself."""
SKIP: Final = "skip"
"""Visual tokens get no update. Their keys and values are made all the same."""
Level = int | float | Literal["full", "standard", "skip"]
"""What a layer does for visual tokens. Beside the names above: an attention range, or a share of the FFN units."""

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
        if type(self.attention_range) is int and self.attention_range == TEXT:
            raise UserError("attention_range must be at least 1; attention to text only is the range 0 of attention_levels")
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
    """What each layer (0-based) does for visual tokens, per operator. `Plan()` is the dense model.

    Layers are accepted in any order and stored sorted. UserError, with field and layer, if a layer is named twice for one
    operator, is negative or no whole number, or has a level that does not exist.
    """

    attention: tuple[int, ...] = ()
    """Layers with Hollow Attention of the standard range."""
    ffn: tuple[int, ...] = ()
    """Layers with a Dynamic FFN of the standard fraction."""
    attention_levels: tuple[tuple[int, Level], ...] = ()
    """Layers whose attention has another level: (layer, range), (layer, TEXT) or (layer, SKIP)."""
    ffn_levels: tuple[tuple[int, Level], ...] = ()
    """Layers whose FFN has another level: (layer, fraction) or (layer, SKIP)."""
    freeze_text_before: bool = False
    """Whether frozen layers also hold the text before the last visual token, as Op-Skip's own runs do; for comparison only."""

    def __post_init__(self) -> None:
        for operator in OPERATORS:
            layers = _checked_layers(f"plan.{operator}", getattr(self, operator))
            levels = _checked_levels(operator, getattr(self, f"{operator}_levels"))
            if twice := sorted(set(layers) & {layer for layer, _ in levels}):
                raise UserError(f"plan.{operator}_levels names layer {twice[0]}, which plan.{operator} names already")
            object.__setattr__(self, operator, layers)
            object.__setattr__(self, f"{operator}_levels", levels)
        if not isinstance(self.freeze_text_before, bool):
            raise UserError(f"plan.freeze_text_before must be true or false, not {quoted(self.freeze_text_before)}")
        if self.freeze_text_before and not self.frozen:
            raise UserError("plan.freeze_text_before is about frozen layers, and the plan freezes none")

    def layers(self, operator: Operator) -> tuple[int, ...]:
        """The layers in which `operator` has the standard level, sorted."""
        return self.attention if operator == "attention" else self.ffn

    def levels(self, operator: Operator) -> tuple[tuple[int, Level], ...]:
        """The layers in which `operator` has a level of its own, neither dense nor standard, sorted, each with this level."""
        return self.attention_levels if operator == "attention" else self.ffn_levels

    def reduced(self, operator: Operator) -> dict[int, Level]:
        """The level of each layer in which `operator` is not dense, by layer, sorted."""
        return dict(sorted([*((layer, STANDARD) for layer in self.layers(operator)), *self.levels(operator)]))

    def level(self, operator: Operator, layer: int) -> Level:
        """What `layer` does."""
        return self.reduced(operator).get(layer, FULL)

    @property
    def frozen(self) -> tuple[int, ...]:
        """The layers that skip both operators, sorted."""
        ffn = dict(self.ffn_levels)
        return tuple(layer for layer, level in self.attention_levels if level == ffn.get(layer) == SKIP)

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless the model's `num_layers` layers include all layers of the plan."""
        for operator in OPERATORS:
            highest = max(self.reduced(operator), default=-1)
            if highest >= num_layers:
                raise UserError(
                    f"the plan reduces {operator} in layer {highest}, but the model has {num_layers} layers (0-{num_layers - 1})"
                )

    def settings(self, num_layers: int) -> list[tuple[Level, Level]]:
        """The levels of attention and FFN in each layer. Raises UserError as `validate` does."""
        self.validate(num_layers)
        attention, ffn = (self.reduced(operator) for operator in OPERATORS)
        return [(attention.get(layer, FULL), ffn.get(layer, FULL)) for layer in range(num_layers)]

    def indices(self, num_layers: int, levels: "Levels") -> tuple[np.ndarray, np.ndarray]:
        """The plan as data: two arrays int32[L], the places of the layers' levels in those of `levels`.

        Raises:
            UserError: as `validate`, or for `freeze_text_before`, which is no level.
            ValueError: a level of the plan is not among `levels`.
        """
        if self.freeze_text_before:
            raise UserError("a plan with freeze_text_before can be run, but no search can start from it")
        attention, ffn = zip(*self.settings(num_layers), strict=True)
        return _places("attention", attention, levels.attention), _places("ffn", ffn, levels.ffn)

    @classmethod
    def of(cls, attention: Mapping[int, Level], ffn: Mapping[int, Level]) -> "Plan":
        """The plan with these levels, by layer; other layers are dense."""
        standard = [tuple(layer for layer, level in named.items() if level == STANDARD) for named in (attention, ffn)]
        own = [tuple(item for item in named.items() if item[1] not in (FULL, STANDARD)) for named in (attention, ffn)]
        return cls(standard[0], standard[1], own[0], own[1])

    def with_layer(self, operator: Operator, layer: int) -> "Plan":
        """This plan with one more layer of the standard level. Raises UserError if the plan reduces that layer already."""
        added = (*self.layers(operator), layer)
        return replace(self, attention=added) if operator == "attention" else replace(self, ffn=added)

    def with_level(self, operator: Operator, layer: int, level: Level) -> "Plan":
        """This plan with another level in one layer, in place of the one that it has."""
        attention, ffn = (self.reduced(known) | ({layer: level} if known == operator else {}) for known in OPERATORS)
        return replace(Plan.of(attention, ffn), freeze_text_before=self.freeze_text_before)

    def lowest_difference(self, other: "Plan") -> int | None:
        """The lowest layer that the two plans treat differently (all layers below compute the same), None if they are equal."""
        differing = {
            layer for operator in OPERATORS for layer, _ in self.reduced(operator).items() ^ other.reduced(operator).items()
        }
        if self.freeze_text_before != other.freeze_text_before:
            differing |= {*self.frozen, *other.frozen}
        return min(differing, default=None)

    def runs(self, num_layers: int) -> list[tuple[int, int, Level, Level]]:
        """Maximal runs of layers with equal treatment: `(start, stop, attention, ffn)`, stop excluded, with their levels."""
        treatment = self.settings(num_layers)
        starts = [i for i in range(num_layers) if i == 0 or treatment[i] != treatment[i - 1]]
        stops = [*starts[1:], num_layers]
        return [(start, stop, *treatment[start]) for start, stop in zip(starts, stops, strict=True)]

    def label(self) -> str:
        """A short text for tables and messages: "attention 20-27, ffn 22+24-27, ffn skipped 28", or "dense"."""
        parts = []
        for operator in OPERATORS:
            by_level: dict[Level, list[int]] = {}
            for layer, level in self.reduced(operator).items():
                if layer not in self.frozen:
                    by_level.setdefault(level, []).append(layer)
            parts += [
                f"{_level_label(operator, level)} {_spans(layers)}" for level, layers in sorted(by_level.items(), key=_depth)
            ]
        if self.frozen:
            parts.append(f"frozen {_spans(self.frozen)}" + (" with the text before" if self.freeze_text_before else ""))
        return ", ".join(parts) or "dense"

    def fields(self) -> dict[str, Any]:
        """The plan as JSON values with the names of a plan file; those of levels only if there are any."""
        fields: dict[str, Any] = {operator: list(self.layers(operator)) for operator in OPERATORS}
        for operator, name in _NUMBER_NAMES.items():
            by_level: dict[Level, list[int]] = {}
            for layer, level in self.levels(operator):
                if layer not in self.frozen:
                    by_level.setdefault(level, []).append(layer)
            if by_level:
                fields[f"{operator}_levels"] = [
                    {"layers": layers, **({"skip": True} if level == SKIP else {name: level})}
                    for level, layers in sorted(by_level.items(), key=_depth)
                ]
        if self.frozen:
            fields["freeze"] = list(self.frozen)
        return fields | ({"freeze_text_before": True} if self.freeze_text_before else {})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Plan":
        """The plan of JSON values with the names of a plan file; other names are ignored.

        Raises:
            UserError: naming field and layer, if a value is wrong or a layer is named twice for one operator.
        """
        for name in (*OPERATORS, *_LAYER_FIELDS):
            if not isinstance(fields.get(name, []), list | tuple):
                form = '[{"layers": [20], "skip": true}]' if name.endswith("_levels") else "[20, 21]"
                kind = "levels" if name.endswith("_levels") else "layers"
                raise UserError(f"{name} must be a list of {kind}, such as {form}, not {quoted(fields[name])}")
        freeze = _checked_layers("plan.freeze", fields.get("freeze", ()))
        by_operator = []
        for operator in OPERATORS:
            standard = _checked_layers(f"plan.{operator}", fields.get(operator, ()))
            entries: list[_Entry] = [(f"plan.{operator}", standard, STANDARD), ("plan.freeze", freeze, SKIP)]
            for number, entry in enumerate(fields.get(f"{operator}_levels", ())):
                entries.append(_read_levels(operator, f"plan.{operator}_levels[{number}]", entry))
            levels: dict[int, Level] = {}
            named: dict[int, str] = {}
            for where, layers, level in entries:
                if twice := [layer for layer in layers if layer in named]:
                    raise UserError(f"{where} names layer {twice[0]}, which {named[twice[0]]} names already")
                named |= dict.fromkeys(layers, where)
                levels |= dict.fromkeys(layers, level)
            by_operator.append(levels)
        return replace(cls.of(*by_operator), freeze_text_before=fields.get("freeze_text_before", False))


_LAYER_FIELDS = ("attention_levels", "ffn_levels", "freeze")
LEVEL_FIELDS = (*_LAYER_FIELDS, "freeze_text_before")
"""Fields of a plan file about levels of single layers."""
PLAN_FIELDS = (*OPERATORS, *LEVEL_FIELDS)
_Entry = tuple[str, tuple[int, ...], Level]
"""A place in a plan file, the layers that it names, and their level."""
_NUMBER_NAMES: dict[Operator, str] = {"attention": "range", "ffn": "fraction"}


@dataclass(frozen=True)
class Levels:
    """The levels of a run: FULL first, SKIP last if it is one of them. A program whose plan is data compiles these."""

    attention: tuple[Level, ...] = (FULL, STANDARD)
    ffn: tuple[Level, ...] = (FULL, STANDARD)

    def __post_init__(self) -> None:
        for levels in (self.attention, self.ffn):
            if levels[:1] != (FULL,) or SKIP in levels[:-1] or len(set(levels)) < len(levels):
                raise ValueError(f"the levels of a run must be distinct, full first and skip last, not {levels}")

    def joined(self, other: "Levels") -> "Levels":
        """These levels, and then the others."""
        return Levels(*(tuple(dict.fromkeys(pair)) for pair in (self.attention + other.attention, self.ffn + other.ffn)))


STANDARD_LEVELS = Levels()
"""On or off: the levels of a ranking run."""


def value_of(operator: Operator, level: Level, reduction: Reduction) -> Level:
    """What a level computes: the standard one as its number, and an FFN with all of its units as dense."""
    if level == STANDARD:
        level = reduction.attention_range if operator == "attention" else float(reduction.active_fraction)
    return FULL if operator == "ffn" and level == 1 else level


def chain(operator: Operator, levels: Iterable[Level], reduction: Reduction) -> tuple[Level, ...]:
    """The levels from the one that computes most to the one that computes least, dense first.

    These are `full > ranges descending > text > skip` and `full > fractions descending > skip`. Of levels that compute the same,
    the first one remains.
    """
    by_value: dict[Level, Level] = {FULL: FULL}
    for level in levels:
        by_value.setdefault(value_of(operator, level, reduction), level)
    return tuple(level for _, level in sorted(by_value.items(), key=_depth))


def parse_level(operator: Operator, text: str) -> Level:
    """The level that the user wrote: `standard`, `text`, `skip`, or a range or fraction. UserError for anything else."""
    words = ("standard", "text", "skip") if operator == "attention" else ("standard", "skip")
    named: dict[str, Level] = {"standard": STANDARD, "text": TEXT, "skip": SKIP}
    if text in words:
        return named[text]
    number = int(text) if operator == "attention" and text.isdecimal() and len(text) < _MOST_DECIMALS else text
    try:
        return _checked_level(operator, f"{operator} levels", number)
    except UserError as error:
        raise UserError(f"{error}; or one of {', '.join(words)}{suggest(text, words)}") from None


def _depth(item: tuple[Level, object]) -> tuple[int, float]:
    """Sorts (level, anything) by how much a level leaves out."""
    level, _ = item
    return (("full", "standard", "", "skip").index(level), 0.0) if isinstance(level, str) else (2, -level)


def _level_label(operator: Operator, level: Level) -> str:
    if level == STANDARD:
        return operator
    if level == SKIP:
        return f"{operator} skipped"
    return f"{operator} to text" if operator == "attention" and level == TEXT else f"{operator} {_NUMBER_NAMES[operator]} {level}"


def _places(operator: Operator, levels: Sequence[Level], known: Sequence[Level]) -> np.ndarray:
    if missing := [level for level in levels if level not in known]:
        raise ValueError(f"{missing[0]} is not among the {operator} levels {', '.join(map(str, known))}")
    return np.array([known.index(level) for level in levels], np.int32)


def _checked_layers(field: str, layers: object) -> tuple[int, ...]:
    if isinstance(layers, str | Mapping) or not isinstance(layers, Iterable):
        raise UserError(f"{field} must be a list of layer numbers, not {quoted(layers)}")
    checked: set[int] = set()
    for layer in layers:
        try:
            number = -1 if isinstance(layer, bool) else operators.index(layer)
        except TypeError:
            number = -1
        if number < 0:
            raise UserError(f"{field}: a layer must be a whole number, at least 0, not {quoted(layer)}")
        if number >= MOST_LAYERS:
            raise UserError(f"{field}: no model has a layer {number}")
        if number in checked:
            raise UserError(f"{field} names layer {number} twice")
        checked.add(number)
    return tuple(sorted(checked))


def _checked_levels(operator: Operator, levels: Any) -> tuple[tuple[int, Level], ...]:
    field = f"plan.{operator}_levels"
    pairs = list(levels)
    _checked_layers(field, [layer for layer, _ in pairs])
    checked = {operators.index(layer): _checked_level(operator, f"{field}: layer {layer}", level) for layer, level in pairs}
    return tuple(sorted(checked.items()))


def _checked_level(operator: Operator, where: str, level: Any) -> Level:
    if level == SKIP:
        return SKIP
    if operator == "ffn":
        if level in (0, 1) and not isinstance(level, bool):
            instead = 'no unit is "skip": true' if level == 0 else "all units are the dense FFN, so leave the layer out"
            raise UserError(f"{where}: the fraction must be above 0 and below 1, not {level}; {instead}")
        return checked_decimal(f"{where}: the fraction", level, "(0, 1]")
    try:
        number = -1 if isinstance(level, bool) else operators.index(level)
    except TypeError:
        number = -1
    if not 0 <= number <= _LARGEST_RANGE:
        raise UserError(
            f"{where}: the range must be a whole number from 0 (attention to text only) to {_LARGEST_RANGE}, not {quoted(level)}"
        )
    return number


def _read_levels(operator: Operator, where: str, entry: Any) -> _Entry:
    """An entry of `attention_levels` or `ffn_levels`."""
    name = _NUMBER_NAMES[operator]
    if not isinstance(entry, dict):
        raise UserError(f'{where} must be an object such as {{"layers": [20], "skip": true}}, not {quoted(entry)}')
    for field in entry:
        if field not in (known := ("layers", name, "skip")):
            raise UserError(f"unknown field {where}.{field}{suggest(field, known)}; known: {', '.join(known)}")
    if "layers" not in entry:
        raise UserError(f"{where}.layers is missing: which layers have this level?")
    if "skip" in entry and entry["skip"] is not True:
        raise UserError(f"{where}.skip must be true, or left out, not {quoted(entry['skip'])}")
    if (name in entry) == ("skip" in entry):
        raise UserError(f'{where} must have either "{name}" or "skip": true')
    layers = _checked_layers(f"{where}.layers", entry["layers"])
    return where, layers, SKIP if "skip" in entry else _checked_level(operator, where, entry[name])


def _spans(layers: Sequence[int]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(starts, stops, strict=True)
    return "+".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in pairs)
