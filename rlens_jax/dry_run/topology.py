"""TPU slices by name, such as `v5e:16x16`: their chips, what those are published to do, and devices to compile for.

Peak rates and memory are the vendor's published specifications (Google Cloud TPU documentation, the pages "TPU v4" ...
"TPU v6e"; interconnect of v2 and v3: Jouppi et al., A Domain-Specific Supercomputer for Training Deep Neural Networks, CACM
2020). What of the memory a program can use is what libtpu 0.0.42.1 says when one needs more.
Only this module asks for libtpu, and only when it is to compile.
"""

import difflib
import importlib.util
from dataclasses import dataclass
from math import prod
from typing import Any

from rlens_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class ChipKind:
    """A generation of chips. Rates are per chip and second."""

    name: str
    flops: float
    """Peak bfloat16 multiplications and additions."""
    memory_gib: int
    """HBM as published."""
    usable_gib: float
    """HBM of one device that a program can use."""
    memory_bytes: float
    """Peak HBM traffic."""
    link_bytes: float
    """Peak interconnect traffic in one direction, all links together."""
    shapes: tuple[str, ...]
    """Topologies that can be asked for; the number of axes is that of the torus."""
    devices_per_chip: int = 1
    """v2 and v3 show each of their two cores as a device, later chips are one."""
    config_name: str = "default"
    """libtpu's name of the mode in which a chip is one device; Cloud TPUs of v4 run in `megacore`."""

    @property
    def torus_axes(self) -> int:
        return self.shapes[-1].count("x") + 1


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
    """A slice of one kind of chips."""

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
        """Devices as JAX sees them."""
        return self.chips * self.kind.devices_per_chip

    @property
    def memory_limit(self) -> int:
        """Bytes of HBM that a program can use on one device."""
        return round(self.kind.usable_gib * GIB)

    @property
    def flops(self) -> float:
        """Peak bfloat16 operations of one device a second."""
        return self.kind.flops / self.kind.devices_per_chip

    @property
    def memory_rate(self) -> float:
        """Peak bytes of HBM traffic of one device a second."""
        return self.kind.memory_bytes / self.kind.devices_per_chip

    @property
    def link_rate(self) -> float:
        """Bytes a second and direction that one device has along one axis of the torus (our assumption: links shared alike)."""
        return self.kind.link_bytes / self.kind.torus_axes / self.kind.devices_per_chip


def find_slice(name: str) -> Slice:
    """The slice of this name. UserError, with the nearest names, when there is none."""
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
            "a dry run needs libtpu, the compiler for TPUs, which is not installed; "
            "pip install 'rlens-jax[tpu]' (no TPU is needed)"
        )


def slice_devices(where: Slice) -> list[Any]:
    """The devices of a slice that is not there, to lower and compile programs for.

    Raises:
        UserError: libtpu is missing, or does not know the topology.
    """
    require_compiler()
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": where.kind.config_name}
    if where.chips == 1:  # libtpu takes hosts to have 2 x 2 chips unless it is told
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options)
    except Exception as error:  # libtpu's own types of errors are not JAX's
        reason = str(error).splitlines()[0]
        raise UserError(f"--dry-run {where.name}: the installed libtpu cannot compile for it ({reason})") from None
    return list(description.devices)
