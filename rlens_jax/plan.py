"""Which layers are reduced (`Plan`), how (`Reduction`), and which tokens are pruned (`Pruning`): values that all parts share.

All are immutable and hashable: static arguments of a compiled program, and keys of a table.
Axis letters: L decoder layers, P visual tokens of a sample, M probes, F FFN width, U FFN units kept.
"""

import operator as operators
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal, get_args, no_type_check

import numpy as np

from rlens_jax.errors import UserError, suggest

Operator = Literal["attention", "ffn"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

ProbeChoice = Literal["strided", "random"]
WindowChoice = Literal["ordinal", "position"]


# Fields are user input and checked here, in one clear line, before any run-time type checker sees them.
@no_type_check
@dataclass(frozen=True)
class Reduction:
    """How a reduced layer treats its visual tokens (Hollow Attention and Probe-Activated Dynamic FFN).

    Args:
      attention_range: R, how many visual tokens a visual token sees, itself included (paper: 256; that it
        counts itself, and that ordinals count and not positions, is our decision).
      active_fraction: share of the FFN units kept for visual tokens, 0 < x <= 1 (paper: 20 %).
      probe_fraction: share of the visual tokens used as probes, 0 < x <= 1 (our decision: one tenth).
      probe: "strided" takes the ordinals (i * P) // M (our decision), "random" draws them (paper).
      window: "ordinal" measures the range in visual tokens, "position" in absolute positions (as some ports).

    Both fractions are exact decimals: 0.1 and "0.1" mean one tenth and not the binary number beside it. They
    are stored as the float that prints as that decimal.

    Raises:
      UserError: for a value out of range, naming the field.
    """

    attention_range: int = 256
    active_fraction: float | str = 0.2
    probe_fraction: float | str = 0.1
    probe: ProbeChoice = "strided"
    window: WindowChoice = "ordinal"

    def __post_init__(self) -> None:
        if type(self.attention_range) is not int or self.attention_range < 1:
            raise UserError(f"attention_range must be a whole number from 1 on, not {self.attention_range!r}")
        for field in ("active_fraction", "probe_fraction"):
            object.__setattr__(self, field, _checked_fraction(field, getattr(self, field)))
        _check_choice("probe", self.probe, get_args(ProbeChoice))
        _check_choice("window", self.window, get_args(WindowChoice))

    def probe_count(self, num_visual: int) -> int:
        """M, the number of probes of a sample with `num_visual` visual tokens; 0 when there are none."""
        return min(num_visual, max(1, num_visual * _exact(self.probe_fraction) // 1))

    def probe_capacity(self, visual_slots: int) -> int:
        """The static number of probe slots that suffices for samples of up to `visual_slots` visual tokens.

        M never falls as P grows, so this is the M of a sample that fills all slots.
        """
        return self.probe_count(visual_slots)

    def kept_units(self, ffn_width: int) -> int:
        """U, the number of units kept out of `ffn_width`: the nearest whole number, halves up, at least 1."""
        return min(ffn_width, max(1, (ffn_width * _exact(self.active_fraction) + Fraction(1, 2)) // 1))


@no_type_check
@dataclass(frozen=True)
class Plan:
    """Which layers (0-based) have Hollow Attention and which the Dynamic FFN. `Plan()` is the dense model.

    Layers may be given in any order and are stored sorted.

    Raises:
      UserError: for a layer that is doubled, negative or not a whole number.
    """

    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in OPERATORS:
            object.__setattr__(self, name, _checked_layers(name, getattr(self, name)))

    def layers(self, operator: Operator) -> tuple[int, ...]:
        """The layers in which `operator` is reduced, sorted."""
        return self.attention if operator == "attention" else self.ffn

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless every layer of the plan is one of the model's `num_layers`."""
        for name in OPERATORS:
            for layer in self.layers(name):
                if layer >= num_layers:
                    raise UserError(
                        f"the plan reduces {name} in layer {layer}, but the model has {num_layers} layers "
                        f"(0-{num_layers - 1})"
                    )

    def flags(self, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
        """The plan as data: `(hollow, dynamic)`, two bool[L] arrays. UserError as `validate`."""
        self.validate(num_layers)
        hollow, dynamic = np.zeros(num_layers, bool), np.zeros(num_layers, bool)
        hollow[list(self.attention)] = True
        dynamic[list(self.ffn)] = True
        return hollow, dynamic

    def with_layer(self, operator: Operator, layer: int) -> "Plan":
        """This plan with one more reduced layer. UserError when that layer is reduced already."""
        added = (*self.layers(operator), layer)
        return replace(self, attention=added) if operator == "attention" else replace(self, ffn=added)

    def lowest_difference(self, other: "Plan") -> int | None:
        """The lowest layer that the two plans treat differently, None when they are equal.

        All layers below it compute the same in both plans.
        """
        differing = (set(self.attention) ^ set(other.attention)) | (set(self.ffn) ^ set(other.ffn))
        return min(differing, default=None)

    def runs(self, num_layers: int) -> list[tuple[int, int, bool, bool]]:
        """Maximal runs of equally treated layers, as `(start, stop, hollow, dynamic)` with stop excluded."""
        hollow, dynamic = self.flags(num_layers)
        treatment = list(zip(hollow.tolist(), dynamic.tolist(), strict=True))
        starts = [i for i in range(num_layers) if i == 0 or treatment[i] != treatment[i - 1]]
        stops = [*starts[1:], num_layers]
        return [(start, stop, *treatment[start]) for start, stop in zip(starts, stops, strict=True)]

    def label(self) -> str:
        """A short text for tables and messages: "attention 20-27, ffn 22+24-27"; "dense" for no reduction."""
        parts = [f"{name} {_spans(self.layers(name))}" for name in OPERATORS if self.layers(name)]
        return ", ".join(parts) or "dense"


@no_type_check
@dataclass(frozen=True)
class FastV:
    """After layer `layer` a share of each sample's visual tokens is dropped (FastV, Chen et al., arXiv 2403.06764).

    The first `layer` layers see all tokens. Those with the lowest attention from the prompt's last token are dropped: its
    row of attention weights in the last of these layers, `layer - 1` counted from 0, averaged over the heads, as in
    the authors' code.

    Args:
      layer: how many layers see all visual tokens, from 1 on (the paper's default: 2).
      share: which part is dropped, an exact decimal, 0 <= share < 1.

    Raises:
      UserError: for a value out of range.
    """

    layer: int = 2
    share: float | str = 0.5

    def __post_init__(self) -> None:
        _check_pruned_layer("FastV", self.layer)
        object.__setattr__(self, "share", _checked_share("FastV", self.share))

    def kept(self, num_visual: int) -> int:
        """How many of a sample's `num_visual` visual tokens are left; never falls as they grow in number."""
        return _kept(num_visual, float(self.share))

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        _check_layer_follows("FastV", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"FastV after layer {self.layer} drops {100 * self.share:g} %"


@no_type_check
@dataclass(frozen=True)
class VTW:
    """After layer `layer` all visual tokens are dropped (Visual Tokens Withdrawal, Lin et al., arXiv 2405.05803).

    Args:
      layer: how many layers see the visual tokens, from 1 on; `rlens_jax.models.vtw` chooses it.

    Raises:
      UserError: for a value out of range.
    """

    layer: int

    def __post_init__(self) -> None:
        _check_pruned_layer("VTW", self.layer)

    def kept(self, num_visual: int) -> int:
        """No visual token is left."""
        return 0

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the pruning in a model of `num_layers`."""
        _check_layer_follows("VTW", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"VTW after layer {self.layer}"


@no_type_check
@dataclass(frozen=True)
class Folder:
    """Before the first layer similar visual tokens are merged (after FOLDER, Wang et al., arXiv 2501.02430).

    FOLDER merges inside of the vision tower's last blocks; here the connector's outputs are merged, so that one program
    serves all families (our decision; `rlens_jax.ops.pruning.merge_similar`).

    Args:
      share: which part is merged away, an exact decimal, 0 <= share < 1.

    Raises:
      UserError: for a value out of range.
    """

    share: float | str = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _checked_share("Folder", self.share))

    def kept(self, num_visual: int) -> int:
        """How many of a sample's `num_visual` visual tokens are left; never falls as they grow in number."""
        return _kept(num_visual, float(self.share))

    def validate(self, num_layers: int) -> None:
        """Any model will do."""

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"FOLDER-style merging of {100 * self.share:g} %"


Pruning = FastV | VTW | Folder
"""A way to be rid of visual tokens, alone or on top of a plan. Survivors keep their order and their rotary positions and are
numbered anew, so reduced layers see a packed sample like any other."""


def _exact(fraction: float | str) -> Fraction:
    # The shortest text that reads back as this float is the decimal the user wrote.
    return Fraction(str(fraction))


def _checked_fraction(field: str, value: Any) -> float:
    """The float that prints as the decimal `value`; UserError when there is none, or it is not in (0, 1]."""
    try:
        decimal = Decimal("nan") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        decimal = Decimal("nan")
    if not (decimal.is_finite() and 0 < decimal <= 1):
        raise UserError(f"{field} must be a decimal number above 0 and at most 1, not {value!r}")
    if _exact(float(decimal)) != Fraction(decimal):
        raise UserError(f"{field} has more digits than a float keeps: {value!r}; write at most 15 digits")
    return float(decimal)


def _checked_share(method: str, value: Any) -> float:
    """The float that prints as the decimal `value`; UserError when there is none, or it is not in [0, 1)."""
    try:
        decimal = Decimal("nan") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        decimal = Decimal("nan")
    if not (decimal.is_finite() and 0 <= decimal < 1):
        raise UserError(
            f"{method}: share must be a decimal number from 0 on and below 1, not {value!r}; VTW drops all visual tokens"
        )
    if _exact(float(decimal)) != Fraction(decimal):
        raise UserError(f"{method}: share has more digits than a float keeps: {value!r}; write at most 15 digits")
    return float(decimal)


def _kept(num_visual: int, share: float | str) -> int:
    # Rounded down as in FastV's code; that a sample keeps one in any case is our decision.
    return min(num_visual, max(1, num_visual * (1 - _exact(share)) // 1))


def _check_pruned_layer(method: str, layer: Any) -> None:
    if type(layer) is not int or layer < 1:
        raise UserError(f"{method}: layer must be a whole number from 1 on, not {layer!r}")


def _check_layer_follows(method: str, layer: int, num_layers: int) -> None:
    if layer >= num_layers:
        raise UserError(
            f"{method} prunes after layer {layer}, but the model has {num_layers} layers; choose 1 to {num_layers - 1}"
        )


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} must be one of {', '.join(choices)}, not {value!r}{suggest(str(value), choices)}")


def _checked_layers(name: str, layers: Any) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise UserError(f"plan.{name} must be a list of layer numbers, not {layers!r}")
    checked: list[int] = []
    for layer in layers:
        try:
            number = -1 if isinstance(layer, bool) else operators.index(layer)
        except TypeError:
            number = -1
        if number < 0:
            raise UserError(f"plan.{name}: a layer is a whole number from 0 on, not {layer!r}")
        if number in checked:
            raise UserError(f"plan.{name} names layer {number} twice")
        checked.append(number)
    return tuple(sorted(checked))


def _spans(layers: tuple[int, ...]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer for layer in layers if layer + 1 not in layers]
    pairs = zip(starts, stops, strict=True)
    return "+".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in pairs)
