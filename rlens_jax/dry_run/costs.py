"""Counts arithmetic, HBM traffic and collectives of a compiled program on one device, with all iterations of its loops.

Arithmetic: matrix products (dots, and the convolutions that TPUs compute them as), and the CostEstimate that a Pallas kernel
declares. Nothing else counts, because the result is compared with the peak rate of the matrix unit.

Traffic: the bytes that every scheduled instruction reads and writes in HBM. Arrays in on-chip memory are free. An array that is
only sliced or gathered counts the rows taken; an array that is updated in place counts the update. A kernel without a
CostEstimate counts its operands and results; that of vision towers counts what it fetches again for each block of queries, too.

Collectives: each with its size, the mesh axis whose devices exchange, and its number of runs.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal, get_args

import numpy as np

from rlens_jax.dry_run.hlo import Computation, Instruction, Loops, Module, Shape, device_groups
from rlens_jax.ops.tower_attention import SCOPE as TOWER_SCOPE
from rlens_jax.plans import OPERATORS

_DECLARED = re.compile(r'\\?"cost_estimate\\?":\s*\{([^}]*)\}')
_KEY_BLOCK = re.compile(r'\\"block_kv\\": (\d+)')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_FREE = frozenset((
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant",
    "iota", "after-all", "partition-id", "replica-id", "opt-barrier", "slice-done",
    "domain", "add-dependency", "get-dimension-size", "copy-done", "async-done",
    "async-update", "all-reduce-done", "all-gather-done", "collective-permute-done", "send-done",
    "recv-done",
))  # fmt: skip
"""Opcodes without traffic: they name existing arrays, or end what another instruction started."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of HBM traffic."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> "Cost":
        return Cost(self.flops * count, self.bytes * count)


LayerKind = Literal["dense", "attention", "ffn", "both"]
LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
"""Which operators of a layer are reduced."""


@dataclass(frozen=True)
class Branch:
    """One branch of a conditional."""

    operator: str
    """The operator that the conditional reduces: `attention`, `ffn`, or none of them."""
    number: int
    """0 for a false flag."""

    def taken(self, kind: LayerKind) -> bool:
        """Whether a layer of this kind takes it. A conditional of another operator is true for every reduced layer."""
        return (self.number > 0) == (kind == "both" or kind == self.operator or (not self.operator and kind != "dense"))

    def __str__(self) -> str:
        return f"{self.operator} {self.number}".strip()


def branches_of(item: Instruction) -> list[tuple[Branch, str]]:
    """The branches of a conditional, and the names of their computations."""
    scope = _SCOPE.search(item.attributes)
    operator = next((name for name in OPERATORS if scope and f"/{name}/" in scope[1]), "")
    return [(Branch(operator, number), name) for number, name in enumerate(item.branches)]


@dataclass(frozen=True)
class ProgramCost:
    """Cost of one run of a program on one device."""

    total: Cost
    layer: Cost | None
    """Cost of one iteration of the loop over layers; None without such a loop."""


def program_cost(module: Module, loops: Loops, kind: LayerKind) -> ProgramCost:
    """Cost of one run of a program with all layers of one kind."""
    walk = _Walk(module, loops, kind)
    total = walk.scheduled(module.entry, inside_layer=False)
    return ProgramCost(total, walk.layer)


class _Walk:
    def __init__(self, module: Module, loops: Loops, kind: LayerKind):
        self._computations = module.computations
        self._loops = loops
        self._kind = kind
        self.layer: Cost | None = None

    def scheduled(self, computation: Computation, inside_layer: bool) -> Cost:
        """Cost of a computation whose instructions run one by one."""
        return sum((self._instruction(item, computation, inside_layer) for item in computation), Cost())

    def _instruction(self, item: Instruction, computation: Computation, inside_layer: bool) -> Cost:
        def below(name: str, inside: bool = inside_layer) -> Cost:
            return self.scheduled(self._computations[name], inside)

        if item.opcode == "while":
            is_layer = self._loops.is_layer_loop(item, inside_layer)
            once = below(item.called["body"], inside_layer or is_layer) + below(item.called["condition"])
            if is_layer:
                self.layer = once
            return once.times(self._loops.trips(item, inside_layer))
        if item.opcode == "conditional":
            return next(below(name) for branch, name in branches_of(item) if branch.taken(self._kind))
        if item.opcode == "call":
            return below(item.called["to_apply"])
        if item.opcode == "fusion":
            inner = self._computations[item.called["calls"]]
            return Cost(self._fused_flops(inner), fusion_bytes(item, computation, self._computations))
        if item.opcode == "async-start":
            return below(item.called["calls"])
        if item.opcode == "custom-call":
            return custom_call_cost(item, computation)
        return Cost(flops(item, computation), instruction_bytes(item, computation))

    def _fused_flops(self, computation: Computation) -> float:
        return sum(
            self._fused_flops(self._computations[item.called["calls"]]) if item.opcode == "fusion" else flops(item, computation)
            for item in computation
        )


def flops(item: Instruction, computation: Computation) -> float:
    """Multiplications and additions of a matrix product; 0 for other instructions."""
    if item.opcode == "dot":
        left = computation.instructions[item.operands[0]].shapes[0]
        contracted = prod(left.dims[axis] for axis in _numbers(item.attribute("lhs_contracting_dims")))
        return 2.0 * item.shapes[0].elements * contracted
    if item.opcode == "convolution":
        left, right = (computation.instructions[name].shapes[0] for name in item.operands[:2])
        return _convolution_flops(item, left, right)
    return 0.0


def _convolution_flops(item: Instruction, left: Shape, right: Shape) -> float:
    """FLOPs of a convolution, without products with padding or with the gaps of a dilated input."""
    labels = item.attribute("dim_labels") or ""
    inputs, output = labels.split("->")
    left_labels, right_labels = inputs.split("_")
    window = item.attribute("window") or "{}"
    products = right.dims[right_labels.index("i")]
    for label, size in zip(output, item.shapes[0].dims, strict=True):
        if not label.isdigit():
            products *= size
            continue
        axis = int(label)
        low, _, _ = _window(window, "pad", axis, "0_0").partition("_")
        products *= _meetings(
            out=size,
            source=left.dims[left_labels.index(label)] if label in left_labels else 1,
            kernel=int(_window(window, "size", axis, "1")),
            stride=int(_window(window, "stride", axis, "1")),
            low=int(low),
            gap=int(_window(window, "lhs_dilate", axis, "1")),
            spread=int(_window(window, "rhs_dilate", axis, "1")),
        )
    return 2.0 * products


def _window(window: str, field: str, axis: int, default: str) -> str:
    """The entry of one axis in a window such as `{size=2x3 pad=0_0x1_1}`."""
    printed = re.search(rf"(?<![\w_]){field}=([^\s}}]+)", window)
    return printed[1].split("x")[axis] if printed else default


@lru_cache
def _meetings(*, out: int, source: int, kernel: int, stride: int, low: int, gap: int, spread: int) -> int:
    """Number of (output, kernel) positions along one axis that read an element of the input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((place >= 0) & (place <= (source - 1) * gap) & (place % gap == 0)).sum())


def _numbers(braces: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", braces or "")]


def custom_call_cost(item: Instruction, computation: Computation) -> Cost:
    """The cost that a kernel declares or that is known, else the bytes of its operands and results."""
    declared = _DECLARED.search(item.attributes)
    scope, block = _SCOPE.search(item.attributes), _KEY_BLOCK.search(item.attributes)
    if scope and block and f"/{TOWER_SCOPE}/" in scope[1]:
        return tower_kernel_cost(computation.operand_shapes(item), int(block[1])) + Cost(0.0, sum(map(_hbm, item.shapes)))
    if declared is None:
        return Cost(0.0, instruction_bytes(item, computation))
    values = dict(re.findall(r'\\?"(\w+)\\?":\s*\\?"?(\d+)', declared[1]))
    return Cost(float(values.get("flops", 0)), float(values.get("bytes_accessed", 0)))


def tower_kernel_cost(operands: Sequence[Shape], block: int) -> Cost:
    """The cost of the splash kernel of a vision tower with this many keys per block, as if no block were padding.

    `operands` are two block maps, queries, keys, values, and the segments of queries and keys. For every block of queries it
    fetches the blocks of keys and values that its map names, and for every head the segments.
    """
    steps, _, queries, keys, values, of_queries, of_keys = operands
    heads, num_queries, head_dim = queries.dims
    _, query_blocks, key_blocks = steps.dims
    visits = query_blocks * key_blocks * block / keys.dims[1]
    again = visits * (_hbm(keys) + _hbm(values) + heads * _hbm(of_keys)) + heads * _hbm(of_queries)
    return Cost(4.0 * heads * num_queries * key_blocks * block * head_dim, again + _hbm(queries))


def instruction_bytes(item: Instruction, computation: Computation) -> float:
    """HBM traffic of one scheduled instruction."""
    if item.opcode in _FREE:
        return 0.0
    reads = [computation.instructions[name] for name in item.operands]
    if item.opcode == "copy-start":  # the result lists destination, source and a flag
        return _hbm(item.shapes[0]) + _hbm(item.shapes[1])
    if item.opcode in ("dynamic-slice", "slice", "slice-start"):
        # The result of slice-start lists the operand, then the slice.
        slice_ = item.shapes[1 if item.opcode == "slice-start" else 0]
        return _hbm(slice_) + (slice_.bytes if reads[0].shapes[0].in_hbm else 0)
    if item.opcode == "gather":
        return _hbm(item.shapes[0]) + (item.shapes[0].bytes if reads[0].shapes[0].in_hbm else 0) + _hbm(reads[1].shapes[0])
    if item.opcode == "dynamic-update-slice":
        update = reads[1].shapes[0]
        return _hbm(update) + (update.bytes if item.shapes[0].in_hbm else 0)
    written = item.shapes
    if item.opcode.endswith("-start"):  # the result lists the operands, then the results
        written = item.shapes[len(computation.operand_shapes(item)) :]
    return sum(map(_hbm, computation.operand_shapes(item))) + sum(map(_hbm, written))


def fusion_bytes(item: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> float:
    """HBM traffic of a fusion: the parts of its operands that it reads, and its results."""
    inner = computations[item.called["calls"]]
    total = 0.0
    for number, name in enumerate(item.operands):
        shapes = computation.instructions[name].shapes
        if len(shapes) == 1 and shapes[0].in_hbm:
            total += bytes_read(inner.parameters[number], inner, computations)
        else:
            total += sum(map(_hbm, shapes))
    for shape, result in zip(item.shapes, _results(inner), strict=True):
        if shape.in_hbm:
            total += _update(result, inner, computations) or shape.bytes
    return total


def bytes_read(array: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes of an array that a fused computation reads: the slices if the array is only sliced, else all."""
    whole = array.shapes[0].bytes
    total = 0.0
    for user in computation.users[array.name]:
        if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and user.operands[0] == array.name):
            total += user.shapes[0].bytes
        elif user.opcode == "bitcast":
            total += bytes_read(user, computation, computations)
        elif user.opcode == "fusion":
            inner = computations[user.called["calls"]]
            places = [place for place, name in enumerate(user.operands) if name == array.name]
            total += sum(bytes_read(inner.parameters[place], inner, computations) for place in places)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == array.name:
            continue  # written in place
        else:
            return whole
    if computation.root.name == array.name:
        return whole
    return min(total, whole)


def _results(computation: Computation) -> list[Instruction]:
    """The instruction behind each result of a fused computation."""
    root = computation.root
    if root.opcode != "tuple":
        return [root] if len(root.shapes) == 1 else [root] * len(root.shapes)
    return [computation.instructions[name] for name in root.operands]


def _update(result: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int | None:
    """Bytes that a result writes if it updates an array in place, else None."""
    while result.opcode in ("bitcast", "fusion"):
        if result.opcode == "bitcast":
            result = computation.instructions[result.operands[0]]
        else:
            computation = computations[result.called["calls"]]
            result = computation.root
    if result.opcode != "dynamic-update-slice":
        return None
    return computation.instructions[result.operands[1]].shapes[0].bytes


def _hbm(shape: Shape) -> int:
    return shape.bytes if shape.in_hbm else 0


KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Axis = Literal["work", "model", "work and model"]
_SPLIT, _START = '"async_collective_fusion_config"', "AsyncCollectiveStart"
"""On TPU a collective that overlaps with arithmetic is spread over several fusions, and each of them names it."""


@dataclass(frozen=True)
class Collective:
    """One collective instruction, seen from one device."""

    kind: str
    shapes: tuple[Shape, ...]
    """Arrays that the device contributes."""
    gathered: tuple[Shape, ...]
    """Arrays that the device receives."""
    axis: Axis
    """The mesh axis whose devices exchange."""
    group_size: int
    """Number of devices that exchange with each other."""
    in_layer_loop: bool
    branches: tuple[Branch, ...]
    """Branches of the conditionals around it; none if it always runs."""
    times: int
    """Runs per run of the program, with the iterations of loops; every branch counts as taken."""

    @property
    def bytes(self) -> int:
        """Bytes per run of the collective that the device contributes or receives, whichever is larger."""
        return max(sum(shape.bytes for shape in side) for side in (self.shapes, self.gathered))

    @property
    def link_bytes(self) -> float:
        """Bytes that each device sends around a ring per run of the collective."""
        n = self.group_size
        rounds = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.bytes * rounds.get(self.kind, (n - 1) / n)

    def runs(self, kind: LayerKind) -> bool:
        """Whether it runs when all layers are of this kind."""
        return all(branch.taken(kind) for branch in self.branches)


def find_collectives(module: Module, loops: Loops, mesh_shape: tuple[int, int]) -> list[Collective]:
    """Every collective between two or more devices, in the order of the text.

    Args:
        module: the partitioned program.
        loops: its trip counts.
        mesh_shape: devices along `work` and `model`; devices are numbered row by row.
    """
    return [
        replace(collective, in_layer_loop=where.in_layer, branches=where.branches, times=where.times)
        for item, holder, where in _placed_collectives(module, module.entry, loops, _Where())
        if (collective := read_collective(item, holder, mesh_shape)) is not None
    ]


@dataclass(frozen=True)
class _Where:
    """Where an instruction stands; the fields are those of `Collective`."""

    in_layer: bool = False
    branches: tuple[Branch, ...] = ()
    times: int = 1


def _placed_collectives(
    module: Module, computation: Computation, loops: Loops, where: _Where
) -> Iterator[tuple[Instruction, Computation, _Where]]:
    def below(name: str, where: _Where) -> Iterator[tuple[Instruction, Computation, _Where]]:
        return _placed_collectives(module, module.computations[name], loops, where)

    for item, holder in _collectives(module, computation):
        yield item, holder, where
    for item in computation:
        if item.opcode == "while":
            is_layer = loops.is_layer_loop(item, where.in_layer)
            repeated = replace(where, times=where.times * loops.trips(item, where.in_layer))
            yield from below(item.called["condition"], repeated)
            yield from below(item.called["body"], replace(repeated, in_layer=where.in_layer or is_layer))
        elif item.opcode == "conditional":
            for branch, name in branches_of(item):
                yield from below(name, replace(where, branches=(*where.branches, branch)))
        elif item.opcode in ("call", "async-start"):
            yield from below(item.called.get("to_apply") or item.called["calls"], where)


def _collectives(module: Module, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
    """Each collective of a scheduled computation and of its fusions once, with the computation that holds it."""
    parts: dict[str | None, tuple[Instruction, Computation]] = {}
    started: set[str | None] = set()
    for item, holder in _mentioned(module, computation):
        if _SPLIT not in item.attributes:
            yield item, holder
        elif any(_START in user.attributes for user in holder.users[item.name]):
            started.add(item.attribute("channel_id"))
            yield item, holder
        else:
            parts.setdefault(item.attribute("channel_id"), (item, holder))
    yield from (part for channel, part in parts.items() if channel not in started)


def _mentioned(module: Module, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
    for item in computation:
        if item.opcode.removesuffix("-start") in KINDS:
            yield item, computation
        elif item.opcode == "fusion":
            yield from _mentioned(module, module.computations[item.called["calls"]])


def read_collective(item: Instruction, computation: Computation, mesh_shape: tuple[int, int]) -> Collective | None:
    """Parse one collective instruction; None if every group is a single device."""
    groups = device_groups(item, prod(mesh_shape))
    axis = mesh_axis(groups, mesh_shape)
    if axis is None:
        return None
    operands = tuple(computation.operand_shapes(item))
    results = item.shapes[len(operands) : 2 * len(operands)] if item.opcode.endswith("-start") else item.shapes
    kind = item.opcode.removesuffix("-start")
    return Collective(kind, operands, results or item.shapes, axis, max(map(len, groups)), False, (), 1)


def mesh_axis(groups: list[tuple[int, ...]], mesh_shape: tuple[int, int]) -> Axis | None:
    """The axis of a (work, model) mesh along which groups of devices lie; None if each group is one device."""
    over: set[str] = set()
    for group in groups:
        rows, columns = ({number[axis] for number in (divmod(device, mesh_shape[1]) for device in group)} for axis in (0, 1))
        over |= {name for name, places in (("work", rows), ("model", columns)) if len(places) > 1}
    if over == {"work", "model"}:
        return "work and model"
    return "work" if over == {"work"} else "model" if over == {"model"} else None


def bytes_sent(collectives: Iterable[Collective], kind: LayerKind) -> float:
    """Bytes that each device sends per run of a program whose layers are all of one kind."""
    return sum(item.link_bytes * item.times for item in collectives if item.runs(kind))
