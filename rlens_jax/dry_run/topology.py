"""TPU slices by name, such as `v5e:16x16`: their chips, published peak rates, and devices to compile for.

Peak rates and memory are the vendor's specifications (Google Cloud TPU documentation, pages "TPU v4" ... "TPU v6e";
interconnect of v2 and v3: Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural Networks, CACM 2020). The
usable memory is the limit in the error messages of libtpu 0.0.42.1. Only `slice_devices` loads libtpu.
"""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rlens_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class ChipKind:
    """A generation of chips. Rates are per chip and per second."""

    name: str
    flops: float
    """Peak bfloat16 multiplications and additions."""
    memory_gib: int
    """Published HBM of a chip."""
    usable_gib: float
    """HBM of one device that a program can use."""
    memory_bytes: float
    """Peak HBM traffic."""
    link_bytes: float
    """Peak interconnect traffic in one direction, all links together."""
    shapes: tuple[str, ...]
    """Available topologies; they have as many axes as the torus."""
    devices_per_chip: int = 1
    """Devices per chip: one per core on v2 and v3, else one."""
    config_name: str = "default"
    """libtpu's name of the mode in which a chip is one device. Cloud TPU v4 runs in `megacore`."""


_PLANE = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_LITE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

CHIP_KINDS = {
    kind.name: kind
    for kind in (
        ChipKind("v2", 45e12, 16, 7.48, 700e9, 248e9, _PLANE, devices_per_chip=2),
        ChipKind("v3", 123e12, 32, 15.48, 900e9, 328e9, (*_PLANE, "16x32", "32x32"), devices_per_chip=2),
        ChipKind("v4", 275e12, 32, 30.75, 1200e9, 300e9, _CUBE, config_name="megacore"),
        ChipKind("v5e", 197e12, 16, 15.75, 819e9, 200e9, _LITE),
        ChipKind("v5p", 459e12, 95, 95.74, 2765e9, 600e9, _CUBE),
        ChipKind("v6e", 918e12, 32, 31.25, 1638e9, 400e9, _LITE),
    )
}
CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class Slice:
    """A slice: a mesh of chips of one kind."""

    kind: ChipKind
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @property
    def hosts(self) -> int:
        return -(-self.chips // CHIPS_PER_HOST)

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.kind.devices_per_chip

    @property
    def memory_limit(self) -> int:
        """Bytes of HBM that a program can use on one device."""
        return round(self.kind.usable_gib * GIB)

    @property
    def flops(self) -> float:
        """Peak bfloat16 operations per second of one device."""
        return self.kind.flops / self.kind.devices_per_chip

    @property
    def memory_rate(self) -> float:
        """Peak HBM traffic of one device, in bytes per second."""
        return self.kind.memory_bytes / self.kind.devices_per_chip

    @property
    def link_rate(self) -> float:
        """Peak traffic of one device in one direction along one axis of the torus, in bytes per second.

        All axes have equal shares of the links (our assumption).
        """
        return self.kind.link_bytes / len(self.shape) / self.kind.devices_per_chip


def ring_rate(target: Slice, group: Sequence[Any]) -> float:
    """Bytes per second that each device of a group sends in an all-reduce around it, without links that wrap around the torus.

    Chips in a rectangle form a ring and send both ways, over the links of one axis' share. A line of n chips has no way back: in
    an all-reduce every link carries all bytes in each direction, 2 (n - 1) / n times what a ring sends over it.
    """
    sides = [len(set(places)) for places in zip(*(tuple(device.coords) for device in group), strict=True)]
    long = [side for side in sides if side > 1]
    if len(long) != 1:
        return target.link_rate
    (chips,) = long
    return target.link_rate / 2 * 2 * (chips - 1) / chips


def find_slice(name: str) -> Slice:
    """The slice of this name. UserError with similar names if there is none."""
    known = [f"{kind.name}:{shape}" for kind in CHIP_KINDS.values() for shape in kind.shapes]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"--dry-run: there is no TPU topology {name!r}; {hint}")
    kind, shape = name.split(":")
    return Slice(CHIP_KINDS[kind], tuple(map(int, shape.split("x"))))


def require_compiler() -> None:
    """UserError unless libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "a dry run needs libtpu, the compiler for TPUs; install it with pip install 'rlens-jax[tpu]' (no TPU is needed)"
        )


def slice_devices(target: Slice) -> list[Any]:
    """Devices to lower and compile programs for. The slice itself is not needed.

    Raises:
        UserError: libtpu is missing or does not support the topology.
    """
    require_compiler()
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": target.kind.config_name}
    if target.chips == 1:  # libtpu's default is hosts with 2 x 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options)
    except Exception as error:  # libtpu raises its own error types
        reason = str(error).splitlines()[0]
        raise UserError(f"--dry-run {target.name}: the installed libtpu cannot compile for it ({reason})") from None
    return list(description.devices)
