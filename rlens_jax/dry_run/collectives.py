"""Lists the collectives of a compiled program, each with its size, mesh axis and number of runs."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from rlens_jax.dry_run.hlo import Computation, Instruction, Loops, Module, Shape

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
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
"""A mesh of named axes, the order of devices on it, and the axes along which devices exchange."""
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


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
    branch: str
    """Branches of the conditionals around it, such as "0" or "1"; empty if it always runs."""
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

    def runs(self, *, dense: bool) -> bool:
        """Whether it runs when all layers are dense, or else when all are reduced."""
        return not self.branch or self.branch.startswith("0") == dense


def find_collectives(module: Module, loops: Loops, mesh_shape: tuple[int, int]) -> list[Collective]:
    """Every collective between two or more devices, in the order of the text.

    Args:
        module: the partitioned program.
        loops: its trip counts.
        mesh_shape: devices along `work` and `model`; devices are numbered row by row.
    """
    return list(_walk(module, module.entry, loops, mesh_shape, inside_layer=False, branch="", times=1))


def _walk(
    module: Module,
    computation: Computation,
    loops: Loops,
    mesh_shape: tuple[int, int],
    *,
    inside_layer: bool,
    branch: str,
    times: int,
) -> Iterator[Collective]:
    def below(name: str, **changed: object) -> Iterator[Collective]:
        state: dict[str, object] = {"inside_layer": inside_layer, "branch": branch, "times": times, **changed}
        return _walk(module, module.computations[name], loops, mesh_shape, **state)  # type: ignore[arg-type]

    for item, holder in _collectives(module, computation):
        collective = read_collective(item, holder, mesh_shape)
        if collective is not None:
            yield replace(collective, in_layer_loop=inside_layer, branch=branch, times=times)
    for item in computation:
        if item.opcode == "while":
            is_layer = loops.is_layer_loop(item, inside_layer)
            more = times * loops.trips(item, inside_layer)
            yield from below(item.called["condition"], times=more)
            yield from below(item.called["body"], inside_layer=inside_layer or is_layer, times=more)
        elif item.opcode == "conditional":
            for number, name in enumerate(item.branches):
                yield from below(name, branch=f"{branch}.{number}".lstrip("."))
        elif item.opcode in ("call", "async-start"):
            yield from below(item.called.get("to_apply") or item.called["calls"])


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
    return Collective(kind, operands, results or item.shapes, axis, max(map(len, groups)), False, "", 1)


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


def mesh_axis(groups: list[tuple[int, ...]], mesh_shape: tuple[int, int]) -> Axis | None:
    """The axis of a (work, model) mesh along which groups of devices lie; None if each group is one device."""
    over: set[str] = set()
    for group in groups:
        rows, columns = ({number[axis] for number in (divmod(device, mesh_shape[1]) for device in group)} for axis in (0, 1))
        over |= {name for name, places in (("work", rows), ("model", columns)) if len(places) > 1}
    if over == {"work", "model"}:
        return "work and model"
    return "work" if over == {"work"} else "model" if over == {"model"} else None


def bytes_sent(collectives: Iterable[Collective], *, dense: bool) -> float:
    """Bytes that each device sends per run of a program whose layers are all dense, or all reduced."""
    return sum(item.link_bytes * item.times for item in collectives if item.runs(dense=dense))
