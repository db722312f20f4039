"""Baselines that drop visual tokens between the decoder's layers, as immutable and hashable values.

PyramidDrop, SparseVLM and DART. FastV and VTW, which drop once and have been here longer, are in `rlens_jax.pruning`. A value out
of range raises UserError.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, get_args, no_type_check

from rlens_jax.errors import UserError, suggest
from rlens_jax.files import quoted
from rlens_jax.plans import checked_decimal, exact

Positions = Literal["kept", "renumbered"]
"""Rotary positions of the tokens that are left. `kept`: their own, and decoding continues behind the whole prompt. `renumbered`:
their place in the shortened sequence, anew at each drop; the layers above continue behind that. Renumbering positions of several
axes (M-RoPE) is undefined."""
SparseVersion = Literal["1.5", "2"]

Keep = int | float | str
"""A whole number is a number of visual tokens of each sample, a decimal number an exact share of them, 0 < keep <= 1."""

_MOST_TOKENS = 2**31 - 1
"""Ordinals are int32."""


class Stage(NamedTuple):
    """A place where visual tokens are dropped or merged."""

    layer: int
    """Number of layers before it; 0 is before the first layer."""
    kept: Callable[[int], int]
    """Tokens left of a sample, from their number *before the first stage*; does not fall as that number grows."""


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class PyramidDrop:
    """Drop visual tokens in several steps (PyramidDrop, Xing et al., arXiv 2410.17247).

    A step scores the tokens by the prompt's last token: its query against their keys, both projected from the states so
    far by the layer that follows; the weights over all tokens before it are averaged over the heads.
    """

    layers: tuple[int, ...] | None = None
    """After how many layers a step follows; None is after each quarter of the layers (8, 16 and 24 of 32), rounded down."""
    keep: tuple[Keep, ...] = (0.5, 0.25, 0.125)
    """What each step leaves of the *original* tokens; does not rise."""
    positions: Positions = "kept"
    """The authors' code renumbers."""

    def __post_init__(self) -> None:
        _set(self, "layers", checked_layers("PyramidDrop", self.layers))
        _set(self, "keep", _checked_steps("PyramidDrop: keep", self.keep))
        _check_as_many("PyramidDrop", self.layers, self.keep)
        check_positions("PyramidDrop", self.positions)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are dropped in a model of `num_layers`."""
        steps = len(self.keep)
        layers = self.layers or scaled_layers([Fraction(step, steps + 1) for step in range(1, steps + 1)], num_layers)
        return tuple(Stage(layer, partial(part_of, keep)) for layer, keep in zip(layers, self.keep, strict=True))

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows each step in a model of `num_layers`."""
        check_layer_follows("PyramidDrop", self.stages(num_layers)[-1].layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"PyramidDrop{_after(self.layers)} keeps {_amounts(self.keep)}{position_label(self.positions)}"


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class SparseVLM:
    """Drop visual tokens in several steps by the attention of relevant text (SparseVLM, Zhang et al., arXiv 2410.04417).

    The *raters* are the text tokens behind the last image that match it: with embeddings v and t, softmax over the text of v.t,
    mean over the visual tokens, above its mean over the text (none: all of the text). A step scores a visual token by the weights
    of the layer before it, averaged over heads and raters.
    """

    keep: tuple[Keep, ...]
    """How many of the tokens each step chooses, as in the authors' tables for 576 tokens, or which share of the original ones;
    does not rise. At least one token is always dropped."""
    layers: tuple[int, ...] | None = None
    """After how many layers a step follows; None is after 3, 7 and 16 layers of 32, in proportion, rounded down."""
    version: SparseVersion = "2"
    """`2` (the authors' "+"): by the 14 heads whose raters attend most to the image. `1.5`: by all heads; and of the n dropped
    tokens, the floor(0.3 n) + 1 with the largest scores are merged into a tenth of their number, rounded down, and one more."""
    positions: Positions = "kept"
    """The authors' version 1.5 renumbers."""

    def __post_init__(self) -> None:
        _set(self, "keep", _checked_steps("SparseVLM: keep", self.keep))
        _set(self, "layers", checked_layers("SparseVLM", self.layers))
        if self.layers is None and len(self.keep) != len(_SPARSE_LAYERS):
            raise UserError(f"SparseVLM: without layers there are {len(_SPARSE_LAYERS)} steps, not {len(self.keep)}; give layers")
        _check_as_many("SparseVLM", self.layers, self.keep)
        check_choice("SparseVLM: version", self.version, get_args(SparseVersion))
        check_positions("SparseVLM", self.positions)

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are merged."""
        return self.version == "1.5"

    @property
    def heads(self) -> int | None:
        """Number of heads that score, None for all."""
        return None if self.merges else _SPARSE_HEADS

    def chosen(self, step: int, num_visual: int) -> int:
        """Tokens that a step chooses by their scores, from their number before the first step."""
        return self._counts(num_visual)[step][0]

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are dropped in a model of `num_layers`."""
        layers = self.layers or scaled_layers(_SPARSE_LAYERS, num_layers)
        return tuple(Stage(layer, partial(self._kept, step)) for step, layer in enumerate(layers))

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows each step in a model of `num_layers`."""
        check_layer_follows("SparseVLM", self.stages(num_layers)[-1].layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"SparseVLM {self.version}{_after(self.layers)} keeps {_amounts(self.keep)}{position_label(self.positions)}"

    def _kept(self, step: int, num_visual: int) -> int:
        return sum(self._counts(num_visual)[step])

    def _counts(self, num_visual: int) -> list[tuple[int, int]]:
        """For each step, how many tokens are chosen by their scores, and how many merged ones are added."""
        entering, counts = num_visual, []
        for keep in self.keep:
            # At most all but one, as in the authors' code; a single token stays (our decision).
            chosen = min(part_of(keep, num_visual), max(entering - 1, min(entering, 1)))
            merged = num_merged(num_recycled(entering - chosen)) if self.merges else 0
            entering = chosen + merged
            counts.append((chosen, merged))
        return counts


@no_type_check  # user input: __post_init__ checks it and raises UserError
@dataclass(frozen=True)
class DART:
    """Keep the visual tokens that repeat a few pivots least (DART, Wen et al., arXiv 2502.11494).

    Pivots are the visual tokens, and the text tokens behind the last image, whose keys in the layer before the drop have the
    largest L1 norms over all heads. The visual pivots are kept. The rest of the budget is dealt to all pivots; each keeps the
    remaining visual tokens that are least similar to it, by the cosine of the states after the final norm. The authors keep
    4 + 8 floor(budget / 8) tokens; here the budget is what is kept, and the first pivots take the remainder.
    """

    keep: Keep
    layer: int = 2
    """Number of layers that see all visual tokens, at least 1."""
    pivots_visual: int = 4
    pivots_text: int = 4
    """At most so many pivots; a sample may have fewer tokens."""
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        _set(self, "keep", checked_keep("DART: keep", self.keep))
        check_layer("DART", self.layer)
        for name in ("pivots_visual", "pivots_text"):
            check_count(f"DART: {name}", getattr(self, name))
        check_positions("DART", self.positions)

    def kept(self, num_visual: int) -> int:
        """Number of tokens left of a sample's `num_visual`; does not fall as `num_visual` grows."""
        return part_of(self.keep, num_visual)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """Where tokens are dropped."""
        return (Stage(self.layer, self.kept),)

    def validate(self, num_layers: int) -> None:
        """Raise UserError unless a layer follows the drop in a model of `num_layers`."""
        check_layer_follows("DART", self.layer, num_layers)

    def label(self) -> str:
        """A short text for tables and messages."""
        return f"DART after layer {self.layer} keeps {_amounts([self.keep])}{position_label(self.positions)}"


_SPARSE_LAYERS = [Fraction(layers, 32) for layers in (3, 7, 16)]
"""After layers 2, 6 and 15, counted from 0, of LLaVA-1.5-7B."""
_SPARSE_HEADS = 14


def num_recycled(dropped: int) -> int:
    """How many of the dropped tokens SparseVLM 1.5 merges: floor(0.3 n) + 1."""
    return 3 * dropped // 10 + 1 if dropped else 0


def num_merged(recycled: int) -> int:
    """Into how many tokens it merges them: floor(m / 10) + 1."""
    return min(recycled, recycled // 10 + 1)


def part_of(keep: Keep, num_visual: int) -> int:
    """How many of a sample's tokens `keep` is. Shares are rounded down as in the authors' codes; at least 1 stays (ours)."""
    return min(num_visual, keep if isinstance(keep, int) else max(1, num_visual * exact(keep) // 1))


def scaled_layers(places: Sequence[Fraction], num_layers: int) -> tuple[int, ...]:
    """Layers at these shares of the depth, rounded down, but at least 1 and later than the one before."""
    layers: list[int] = []
    for place in places:
        layers.append(max(1 + max(layers, default=0), num_layers * place // 1))
    return tuple(layers)


def check_layer(method: str, layer: object) -> None:
    """Raise UserError unless `layer` is a number of layers before a drop."""
    if type(layer) is not int or layer < 1:
        raise UserError(f"{method}: layer must be a whole number, at least 1, not {quoted(layer)}")


def check_layer_follows(method: str, layer: int, num_layers: int) -> None:
    """Raise UserError unless a layer follows a drop after `layer` layers."""
    if layer >= num_layers:
        raise UserError(
            f"{method} prunes after layer {layer}, but the model has {num_layers} layers; choose 1 to {num_layers - 1}"
        )


def check_count(name: str, count: object) -> None:
    """Raise UserError unless `count` is a number of tokens, at least 1."""
    if type(count) is not int or not 1 <= count <= _MOST_TOKENS:
        raise UserError(f"{name} must be a whole number, at least 1, not {quoted(count)}")


def check_positions(method: str, positions: object) -> None:
    """Raise UserError unless `positions` is one of `Positions`."""
    check_choice(f"{method}: positions", positions, get_args(Positions))


def position_label(positions: Positions) -> str:
    """What a label says of positions."""
    return "" if positions == "kept" else ", positions renumbered"


@no_type_check
def checked_layers(method: str, layers: object) -> tuple[int, ...] | None:
    """Rising numbers of layers before each drop, or None. UserError for anything else."""
    if layers is None:
        return None
    checked = _checked_list(f"{method}: layers", layers)
    for layer in checked:
        check_layer(method, layer)
    if any(later <= layer for layer, later in pairwise(checked)):
        raise UserError(f"{method}: layers must rise, not {quoted(list(checked))}")
    return checked


def checked_keep(name: str, value: object) -> int | float:
    """A number of tokens, at least 1, or a share, above 0 and at most 1. UserError for anything else."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= len(str(_MOST_TOKENS)):
        value = int(value)
    if type(value) is int:
        if not 1 <= value <= _MOST_TOKENS:
            raise UserError(f"{name} must be at least 1 token and at most {_MOST_TOKENS}, not {quoted(value)}")
        return value
    return checked_decimal(f"{name}, unless it is a whole number of tokens,", value, "(0, 1]")


@no_type_check
def _checked_steps(name: str, values: object) -> tuple[Keep, ...]:
    checked = tuple(checked_keep(name, value) for value in _checked_list(name, values))
    if len({type(value) for value in checked}) > 1:
        raise UserError(f"{name} must be numbers of tokens or shares, not both, not {quoted(list(checked))}")
    if list(checked) != sorted(checked, reverse=True):
        raise UserError(f"{name} must not rise, not {quoted(list(checked))}: dropped tokens do not come back")
    return checked


def _checked_list(name: str, values: object) -> tuple[object, ...]:
    listed = () if isinstance(values, str | dict) or not isinstance(values, Iterable) else tuple(values)
    if not 1 <= len(listed) <= _MOST_STEPS:
        raise UserError(f"{name} must be a list with a number for each step, at most {_MOST_STEPS}, not {quoted(values)}")
    return listed


_MOST_STEPS = 16


def _check_as_many(method: str, layers: Sequence[int] | None, values: Sequence[object]) -> None:
    if layers is not None and len(layers) != len(values):
        raise UserError(f"{method}: keep must have a number for each of the {len(layers)} layers, not {len(values)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of the `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {quoted(value)}{suggest(str(value), choices)}")


def _set(value: object, name: str, checked: object) -> None:
    object.__setattr__(value, name, checked)


def _after(layers: Sequence[int] | None) -> str:
    return "" if layers is None else f" after layers {', '.join(map(str, layers))}"


def _amounts(values: Sequence[Keep]) -> str:
    whole = isinstance(values[0], int)
    return f"{', '.join(str(keep) if whole else f'{100 * float(keep):g}' for keep in values)}{' tokens' if whole else ' %'}"
