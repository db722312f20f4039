"""Mapping tables between published tensors and our parameters: one set of rows for both directions.

A row names a published tensor, our parameter, and the einops pattern from the first to the second, such as
"(n h) d -> d n h". Read from right to left, the pattern is the way back. `linear`, `norm` and `decoder_parts` make the rows
that families share. All problems are collected, so that one message shows them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

import numpy as np
from einops import rearrange

from rlens_jax.errors import UserError, suggest
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.models.layers import Sizes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = ("q_proj", "k_proj", "v_proj")
MAX_PROBLEMS = 20
"""Max number of problems shown in a message."""


@dataclass(frozen=True)
class Row:
    """One published tensor and where it goes.

    A fused tensor has several targets: the first axis right of the arrow is cut into one piece per target, and
    `pieces` are the patterns of these pieces, each with its length first: a size or 1. Without `pieces` every
    target gets one slice. Flat q|k|v is `Row("qkv", ("q", "k", "v"), "(three n h) e -> three e n h")`; q|k|v
    within each of k groups is `Row("qkv", ("q", "k", "v"), "(k all h) d -> all d k h", (QUERY, KEY, KEY))` with
    `QUERY = "group d k h -> d (k group) h"` and `KEY = "1 d k h -> d k h"`.
    """

    source: str
    targets: str | tuple[str, ...]
    pattern: str
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Rows that share the beginnings of their names and the sizes of their axes.

    With `num_layers`, `source` contains "{layer}"; targets have a leading layer axis that patterns do not name.
    """

    source: str
    target: str
    sizes: Mapping[str, int]
    rows: tuple[Row, ...]
    num_layers: int | None = None


@dataclass(frozen=True)
class Ignored:
    """Published tensors that are known and not needed."""

    source: str
    """Regular expression of the whole name, in the spelling after renaming."""
    reason: str


@dataclass(frozen=True)
class Place:
    """Our side of a published tensor: the dotted path of a parameter, and the layer if it has a layer axis."""

    path: str
    layer: int | None


@dataclass(frozen=True)
class Map:
    """An einops pattern with the sizes of all its axes."""

    left: str
    right: str
    sizes: Mapping[str, int]

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self._shape(self.left)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self._shape(self.right)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, f"{self.left} -> {self.right}", **self.sizes)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, f"{self.right} -> {self.left}", **self.sizes)

    def _shape(self, side: str) -> tuple[int, ...]:
        groups = re.findall(r"\(.*?\)|\w+", side)
        return tuple(prod(self.sizes.get(axis, 1) for axis in re.findall(r"\w+", group)) for group in groups)


def _map(pattern: str, sizes: Mapping[str, int]) -> Map:
    left, right = (side.strip() for side in pattern.split("->"))
    return Map(left, right, {axis: sizes[axis] for axis in re.findall(r"\w+", left) if axis != "1"})


@dataclass(frozen=True)
class Tensor:
    """A published tensor: its places in our model and, from the sizes, its shape and the maps in both directions."""

    name: str
    places: tuple[Place, ...]
    whole: Map
    pieces: tuple[Map, ...]
    """Maps of the pieces of a fused tensor; empty if there is only one place."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.in_shape

    @property
    def place_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the arrays in the places."""
        return tuple(piece.out_shape for piece in self.pieces) or (self.whole.out_shape,)

    def to_ours(self, array: np.ndarray) -> list[np.ndarray]:
        """The array of each place; views of `array` where possible."""
        array = self.whole(array)
        if not self.pieces:
            return [array]
        ends = np.cumsum([piece.in_shape[0] for piece in self.pieces])[:-1]
        return [piece(part) for piece, part in zip(self.pieces, np.split(array, ends), strict=True)]

    def to_published(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The published tensor from the arrays in our places."""
        if not self.pieces:
            return self.whole.inverse(arrays[0])
        return self.whole.inverse(
            np.concatenate([piece.inverse(array) for piece, array in zip(self.pieces, arrays, strict=True)])
        )


def _resolve(part: Part, row: Row, layer: int | None) -> Tensor:
    targets = (row.targets,) if isinstance(row.targets, str) else row.targets
    places = tuple(Place(part.target + target, layer) for target in targets)
    name = (part.source if layer is None else part.source.format(layer=layer)) + row.source
    if len(targets) == 1:
        return Tensor(name, places, _map(row.pattern, part.sizes), ())
    fused, *rest = row.pattern.split("->")[1].split()
    patterns = row.pieces or (f"1 {' '.join(rest)} -> {' '.join(rest)}",) * len(targets)
    pieces = tuple(_map(pattern, part.sizes) for pattern in patterns)
    sizes = {**part.sizes, fused: sum(piece.in_shape[0] for piece in pieces)}
    return Tensor(name, places, _map(row.pattern, sizes), pieces)


@dataclass(frozen=True)
class Table:
    """All published tensors of a model.

    Rows have the names of published checkpoints. `renames` turn other spellings into these: pairs of regular expression
    and replacement, applied in order. `copies` are tensors that may be present besides or in place of another (a tied head).
    """

    parts: tuple[Part, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Ignored, ...] = ()
    copies: Mapping[str, str] | None = None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that must be present, by name; the layers of a row one after another."""
        tensors = [
            _resolve(part, row, layer)
            for part in self.parts
            for row in part.rows
            for layer in ([None] if part.num_layers is None else range(part.num_layers))
        ]
        return {tensor.name: tensor for tensor in tensors}

    def published_name(self, name: str) -> str:
        """A tensor's name in the published spelling."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def check_covers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the table fills each parameter of a model (path -> shape) once; ValueError if not."""
        filled: dict[str, Counter[int | None]] = {path: Counter() for path in shapes}
        for tensor in self.tensors.values():
            for place, shape in zip(tensor.places, tensor.place_shapes, strict=True):
                if place.path not in shapes:
                    raise ValueError(f"{tensor.name}: there is no parameter {place.path}")
                expected = shapes[place.path] if place.layer is None else shapes[place.path][1:]
                if shape != expected:
                    raise ValueError(f"{tensor.name}: gives {place.path} {shape} where it has {expected}")
                filled[place.path][place.layer] += 1
        for path, times in filled.items():
            layered = None not in times
            if times != Counter(range(shapes[path][0]) if layered and times else [None]):
                raise ValueError(f"{path}: filled {dict(times)} times")


def pattern_sizes(sizes: Sizes) -> dict[str, int]:
    """Sizes by lower-case letter, as the patterns of rows have them."""
    return {letter.lower(): size for letter, size in sizes.items()}


def linear(
    source: str, target: str | tuple[str, ...], pattern: str, *, separator: str = ".", bias: bool = True
) -> tuple[Row, ...]:
    """Weight and bias of a linear map, or of several that are published as one.

    Args:
        source: published name of the module.
        target: our module, or the modules of a fused weight.
        pattern: of the weight, whose first published axis is the output. "(n h) e -> e n h" and a bias
            "(n h) -> n h"; a fused one begins with "(three n h)".
        separator: between the name of the module and "weight" or "bias".
        bias: whether there is a bias.
    """
    output = re.match(r"\(.*?\)|\w+", pattern)
    assert output is not None

    def targets(name: str) -> str | tuple[str, ...]:
        return f"{target}.{name}" if isinstance(target, str) else tuple(f"{module}.{name}" for module in target)

    weight = Row(f"{source}{separator}weight", targets("kernel"), pattern)
    if not bias:
        return (weight,)
    return weight, Row(f"{source}{separator}bias", targets("bias"), f"{output[0]} -> {output[0].strip('()')}")


def norm(source: str, target: str, axis: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Scale and, for a LayerNorm, bias of a norm over one axis."""
    identity = f"{axis} -> {axis}"
    scale = Row(f"{source}.weight", f"{target}.scale", identity)
    return (scale, Row(f"{source}.bias", f"{target}.bias", identity)) if bias else (scale,)


def decoder_parts(config: DecoderConfig) -> tuple[Part, ...]:
    """Rows of embedding, layers, norm and, if untied, head; families bring their prefixes to these names by renames."""
    sizes = pattern_sizes(config.sizes)
    bias, head_norms = config.qkv_bias, ("q_norm", "k_norm") if config.qk_norm else ()
    return (
        Part(
            "",
            "decoder.",
            sizes,
            (
                Row(EMBEDDING, "embedding", "v d -> v d"),
                *norm("model.norm", "norm", "d", bias=False),
                *(() if config.tied_head else (Row(HEAD, "head", "v d -> v d"),)),
            ),
        ),
        Part(
            "model.layers.{layer}.",
            "decoder.layers.",
            sizes,
            (
                *norm("input_layernorm", "input_norm", "d", bias=False),
                *linear("self_attn.q_proj", "attention.q_proj", "(n h) d -> d n h", bias=bias),
                *linear("self_attn.k_proj", "attention.k_proj", "(k h) d -> d k h", bias=bias),
                *linear("self_attn.v_proj", "attention.v_proj", "(k h) d -> d k h", bias=bias),
                *linear("self_attn.o_proj", "attention.o_proj", "d (n h) -> n h d", bias=False),
                *(row for name in head_norms for row in norm(f"self_attn.{name}", f"attention.{name}", "h", bias=False)),
                *norm("post_attention_layernorm", "ffn_norm", "d", bias=False),
                # [F, D] for all three: one row per unit.
                *linear("mlp.gate_proj", "ffn.gate_proj", "f d -> f d", bias=False),
                *linear("mlp.up_proj", "ffn.up_proj", "f d -> f d", bias=False),
                *linear("mlp.down_proj", "ffn.down_proj", "d f -> f d", bias=False),
            ),
            config.num_layers,
        ),
    )


class Problems:
    """Collects what is wrong with a checkpoint, for one message."""

    def __init__(self, subject: str):
        self.subject = subject
        self.lines: list[Callable[[], str]] = []

    def add(self, where: str, tensor: str, what: str | Callable[[], str]) -> None:
        """Add one line; a function is called only if the line is shown."""
        self.lines.append(lambda: f"{where}: {tensor}: {what if isinstance(what, str) else what()}")

    def raise_any(self) -> None:
        """Raise UserError if a problem was added."""
        if not self.lines:
            return
        shown = [line() for line in self.lines[:MAX_PROBLEMS]]
        if len(self.lines) > MAX_PROBLEMS:
            shown.append(f"... and {len(self.lines) - MAX_PROBLEMS} more")
        count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
        raise UserError("\n  ".join([f"{self.subject}: {count} with the weights", *shown]))


@dataclass(frozen=True)
class Found:
    """A tensor that a checkpoint holds."""

    name: str
    file: str
    shape: tuple[int, ...]


def _not_known(name: str, missing: set[str], expected: Iterable[str]) -> str:
    return f"not known{suggest(name, sorted(missing) or expected)}"


def match(table: Table, found: Iterable[Found], problems: Problems) -> dict[str, Found]:
    """Assign the tensors of a checkpoint to published names and copies; what does not fit is added to `problems`."""
    expected = {name: tensor.shape for name, tensor in table.tensors.items()}
    copies = {name: expected[original] for name, original in (table.copies or {}).items()}
    matched: dict[str, Found] = {}
    missing = set(expected)
    for item in found:
        name = table.published_name(item.name)
        if any(re.fullmatch(ignored.source, name) for ignored in table.ignored):
            continue
        if name not in expected and name not in copies:
            problems.add(item.file, item.name, partial(_not_known, name, missing, expected))
            continue
        if name in matched:
            other = matched[name]
            spelled = "" if other.name == item.name else f" as {other.name}"
            problems.add(item.file, item.name, f"doubled, it is also in {other.file}{spelled}")
            continue
        matched[name] = item
        missing.discard(name)
        shape = expected.get(name) or copies[name]
        if item.shape != shape:
            problems.add(item.file, item.name, f"has shape {list(item.shape)}, expected {list(shape)}")
    for name, original in (table.copies or {}).items():
        if original in missing and name in matched:  # either name will do for both
            matched[original] = matched[name]
            missing.discard(original)
    for name, shape in expected.items():
        if name in missing:
            problems.add(problems.subject, name, f"missing, expected with shape {list(shape)}")
    return matched
