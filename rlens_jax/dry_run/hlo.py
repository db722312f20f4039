"""Parses the text of a compiled XLA program into instructions, and counts how often its loops run.

The parser reads what an optimised, partitioned module prints; `costs` counts its work.

XLA's own cost analysis counts the body of every loop once. The trip count of a scan is in the text: XLA for CPUs prints it
(`known_trip_count`); for a TPU it is the difference between the bound and the first value of the loop's counter. A count that
depends on data comes from the caller: the number of layers, and the number of decoding steps around them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,<=? ]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?<![\w.\-])(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
"""A mesh of named axes, the order of devices on it, and the axes along which devices exchange."""
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Shape:
    """The part of an array that one device holds."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True
    """False if the compiler placed the array in on-chip memory."""

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding that a tiled layout may add."""
        return -(-self.elements * element_bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def element_bits(dtype: str) -> int:
    """Bits of one element."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise ValueError(f"unknown element type {dtype!r}")
    return int(digits[0])


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Shapes of the result. A tuple lists all its leaves in order."""
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands."""
    arguments: str
    """The text between the parentheses, such as a parameter's number or a constant's value."""
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a word or in braces; None if the instruction lacks it."""
        printed = re.search(
            rf"(?:^|[ ,]){re.escape(name)}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|(?:\[[^\]]*\]|\([^)]*\)|[^\s,])+)", self.attributes
        )
        return printed[1] if printed else None

    @cached_property
    def called(self) -> Mapping[str, str]:
        """Called computations by attribute name, such as `body` or `condition`."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """The branches of a conditional; the one for a false predicate is first."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        if "true_computation" in self.called:
            return self.called["false_computation"], self.called["true_computation"]
        return ()


@dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, operands before their users."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        return next(item for item in self if item.is_root)

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """Parameters by number."""
        return {int(item.arguments): item for item in self if item.opcode == "parameter"}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The instructions that read each instruction's result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for item in self:
            for operand in dict.fromkeys(item.operands):
                users[operand].append(item)
        return {name: tuple(items) for name, items in users.items()}

    def operand_shapes(self, item: Instruction) -> list[Shape]:
        """Shapes of the arrays that an instruction reads, with tuples flattened."""
        return [shape for name in item.operands for shape in self.instructions[name].shapes]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: Computation = field(repr=False)


def parse_module(text: str) -> Module:
    """Parse the output of `compiled.as_text()`.

    Raises:
        ValueError: the text is not a compiled module.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    instructions: dict[str, Instruction] | None = None
    name = ""
    for line in _whole_lines(text):
        if instructions is None:
            if header := _HEADER.match(line):
                name, instructions = header[2], {}
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
            instructions = None
        elif _INSTRUCTION.match(line):
            item = parse_instruction(line)
            instructions[item.name] = item
    if entry not in computations:
        raise ValueError("no ENTRY computation in the text of the compiled program")
    return Module(computations, computations[entry])


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of a module; those of a Pallas kernel's metadata, up to one with `}}`, are joined to its instruction."""
    opened = ""
    for line in text.splitlines():
        whole = opened + line
        opened = whole if whole.endswith("kernel_metadata={") or (opened and not line.startswith("}}")) else ""
        if not opened:
            yield whole


def parse_instruction(line: str) -> Instruction:
    """Parse one instruction, such as `ROOT %add.1 = f32[2]{0} add(%a, %b), metadata={...}`."""
    start = _INSTRUCTION.match(line)
    if start is None:
        raise ValueError(f"no HLO instruction: {line!r}")
    rest = line[start.end() :]
    kind, rest = _split_closing(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split_closing("(" + rest)
    return Instruction(
        name=start[2],
        opcode=opcode.strip(),
        shapes=parse_shapes(kind),
        operands=tuple(_NAME.findall(arguments)) if opcode.strip() != "constant" else (),
        attributes=attributes.lstrip(", "),
        arguments=arguments[1:-1],
        is_root=bool(start[1]),
    )


def parse_shapes(kind: str) -> tuple[Shape, ...]:
    """Parse a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(kind):
        sizes = tuple(int(size.strip("<=? ")) for size in dims.split(",") if size.strip())
        space = _MEMORY_SPACE.search(layout)
        shapes.append(Shape(dtype, sizes, in_hbm=space is None or space[1] == "0"))
    return tuple(shapes)


def _split_closing(text: str) -> tuple[str, str]:
    """Split a text that begins with a parenthesis after the matching one; parentheses in quotes do not count."""
    depth, quoted = 0, False
    for place, character in enumerate(text):
        if character == '"' and text[place - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return text[: place + 1], text[place + 1 :].lstrip()
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")


def device_groups(item: Instruction, num_devices: int) -> list[tuple[int, ...]]:
    """Groups of devices that exchange with each other; for a permutation, the pairs of source and target.

    Raises:
        ValueError: unknown notation.
    """
    pairs = item.attribute("source_target_pairs")
    if pairs is not None:
        return [(int(source), int(target)) for source, target in _PAIR.findall(pairs)]
    listed = item.attribute("replica_groups")
    if listed is None or listed == "{}":
        return [tuple(range(num_devices))]
    iota = _IOTA.match(listed)
    if iota:
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        return [tuple(group) for group in np.arange(prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()]
    named = _NAMED.search(item.attributes)
    if named:
        return _named_groups(named)
    if not listed.startswith("{{"):
        raise ValueError(f"replica_groups in an unknown notation: {listed}")
    return [tuple(int(n) for n in group.split(",") if n) for group in re.findall(r"\{([\d,]*)\}", listed)]


def _named_groups(named: re.Match[str]) -> list[tuple[int, ...]]:
    """Groups along axes that XLA names. `'a':(2)4` is a part of axis a: seen as 2 x 4 x ..., the part of size 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    count = prod(sizes.values())
    dims = [int(n) for n in named[2].split(",")] if named[2] else [count]
    order = [int(n) for n in named[3].split(",")] if named[3] else range(len(dims))
    parts = {name: (1, size, 1) for name, size in sizes.items()}
    along = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[4])
    for name, before, size in along:
        if size:
            parts[name] = (int(before), int(size), sizes[name] // (int(before) * int(size)))
    devices = np.arange(count).reshape(dims).transpose(order)
    devices = devices.reshape([n for part in parts.values() for n in part])
    inner = [3 * list(parts).index(name) + 1 for name, *_ in along]
    outer = [axis for axis in range(devices.ndim) if axis not in inner]
    size = prod(devices.shape[axis] for axis in inner)
    return [tuple(group) for group in devices.transpose([*outer, *inner]).reshape(-1, size).tolist()]


def known_trips(module: Module) -> dict[str, int | None]:
    """The trip count of every `while` by its name; None if it depends on data."""
    return {
        item.name: _trips(item, computation, module.computations[item.called["condition"]])
        for computation in module.computations.values()
        for item in computation
        if item.opcode == "while"
    }


def _trips(loop: Instruction, around: Computation, condition: Computation) -> int | None:
    printed = _KNOWN_TRIPS.search(loop.attributes)
    if printed:
        return int(printed[1])
    initial = around.instructions[loop.operands[0]]
    if initial.opcode != "tuple":
        return None

    def constant(item: Instruction, computation: Computation) -> int | None:
        """The value of a number before the first iteration, if it is a constant."""
        while item.opcode == "copy":
            item = computation.instructions[item.operands[0]]
        if item.opcode == "constant" and item.arguments.isdigit():
            return int(item.arguments)
        if item.opcode == "get-tuple-element" and computation is condition:
            return constant(around.instructions[initial.operands[int(item.attribute("index") or 0)]], around)
        return None

    end = condition.root
    if end.opcode != "compare" or end.attribute("direction") != "LT":
        return None
    first, last = (constant(condition.instructions[name], condition) for name in end.operands)
    return None if first is None or last is None else last - first


class Loops:
    """Trip counts of a module's loops, and which of them is the loop over layers.

    The loop over layers is the outermost loop whose known count is `layers`; if there is none, it is an outermost loop of
    unknown count. A loop of unknown count around it runs the decoding steps. A loop of unknown count inside a layer (tiles that
    overflow) is counted once, because it rarely runs (our assumption).

    Args:
        module: the compiled program.
        layers: iterations of the loop over layers.
        steps: iterations of a loop of unknown count around the loop over layers.
    """

    def __init__(self, module: Module, layers: int, steps: int = 1):
        self._module = module
        self._layers = layers
        self._steps = steps
        self.known = known_trips(module)

    def is_layer_loop(self, loop: Instruction, inside_layer: bool) -> bool:
        """Whether a `while` is the loop over layers."""
        if inside_layer:
            return False
        known = self.known[loop.name]
        if known is not None:
            return known == self._layers
        body = self._module.computations[loop.called["body"]]
        return self._steps == 1 or not self._contains_layers(body)

    def trips(self, loop: Instruction, inside_layer: bool) -> int:
        """Iterations of a `while` per execution."""
        known = self.known[loop.name]
        if known is not None:
            return known
        if inside_layer:
            return 1
        return self._layers if self.is_layer_loop(loop, inside_layer) else self._steps

    def _contains_layers(self, computation: Computation) -> bool:
        for item in computation:
            if item.opcode == "while" and self.known[item.name] == self._layers:
                return True
            below = [*item.called.values(), *item.branches] if item.opcode in ("while", "conditional", "call") else []
            if any(self._contains_layers(self._module.computations[name]) for name in below):
                return True
        return False
