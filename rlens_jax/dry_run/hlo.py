"""The text of a compiled XLA program as data: computations of instructions with shapes, operands and what they call.

Only what an optimised, partitioned module prints is read; nothing is interpreted here. See `costs` for arithmetic and memory
traffic, `collectives` for what crosses the interconnect, `loops` for how often bodies run.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,<=? ]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?<![\w.\-])(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Shape:
    """An array as one device holds it."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True
    """False for what the compiler placed in on-chip memory."""

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
    """Bits of one element; complex numbers are two floats, and 8-bit floats are spelled in many ways."""
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
    """Of the result; of a tuple, all its leaves in order."""
    operands: tuple[str, ...]
    attributes: str
    """What stands after the operands, as printed."""
    arguments: str
    """What stands between the parentheses, as printed: a parameter's number, a constant's value."""
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a word or in braces; None when the instruction has none of this name."""
        found = re.search(
            rf"(?:^|[ ,]){re.escape(name)}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|(?:\[[^\]]*\]|\([^)]*\)|[^\s,])+)",
            self.attributes,
        )
        return found[1] if found else None

    @cached_property
    def called(self) -> Mapping[str, str]:
        """Computations by the name under which the instruction calls them."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Of a conditional, its branches; that of a false predicate first."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        if "true_computation" in self.called:
            return self.called["false_computation"], self.called["true_computation"]
        return ()


@dataclass(frozen=True)
class Computation:
    """Instructions by name, operands before their users."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        return next(item for item in self if item.is_root)

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """By number."""
        return {int(item.arguments): item for item in self if item.opcode == "parameter"}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Of each instruction, those that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for item in self:
            for operand in dict.fromkeys(item.operands):
                found[operand].append(item)
        return {name: tuple(items) for name, items in found.items()}

    def operand_shapes(self, item: Instruction) -> list[Shape]:
        """The arrays that an instruction reads, tuples flattened."""
        return [shape for name in item.operands for shape in self.instructions[name].shapes]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: Computation = field(repr=False)


def parse_module(text: str) -> Module:
    """Read what `compiled.as_text()` prints.

    Raises:
        ValueError: it is no such text.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    instructions: dict[str, Instruction] | None = None
    name = ""
    for line in text.splitlines():
        if instructions is None:
            header = _HEADER.match(line)
            if header:
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


def parse_instruction(line: str) -> Instruction:
    """One instruction of a computation, such as `ROOT %add.1 = f32[2]{0} add(%a, %b), metadata={...}`."""
    start = _INSTRUCTION.match(line)
    if start is None:
        raise ValueError(f"no HLO instruction: {line!r}")
    rest = line[start.end() :]
    kind, rest = _split_type(rest)
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
    """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(kind):
        sizes = tuple(int(size.strip("<=? ")) for size in dims.split(",") if size.strip())
        space = _MEMORY_SPACE.search(layout)
        shapes.append(Shape(dtype, sizes, in_hbm=space is None or space[1] == "0"))
    return tuple(shapes)


def _split_type(text: str) -> tuple[str, str]:
    """A type and what follows it."""
    if text.startswith("("):
        return _split_closing(text)
    kind, _, rest = text.partition(" ")
    return kind, rest


def _split_closing(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, cut after the one that closes it; those in quotes do not count."""
    depth, quoted = 0, False
    for place, character in enumerate(text):
        if character == '"' and text[place - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return text[: place + 1], text[place + 1 :].lstrip()
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")
