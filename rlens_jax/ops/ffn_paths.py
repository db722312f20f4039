"""The ways of visual tokens through the FFN of a reduced layer, and which is the fastest on a device, by arithmetic.

Nothing here was timed: `rlens_jax.doctor` times all ways of a device beside the one that is taken. All ways compute the same, in
sums of another order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from rlens_jax.config import FfnPath
from rlens_jax.sharding.mesh import FfnForm

FfnWay = Literal["gathered", "masked", "kernel"]
"""`gathered`: text and probes through all units, then visual tokens through copies of the kept ones. `masked`: all tokens through
all units in one pass over the weights, and those that a sample did not keep count 0 for its visual tokens. `kernel`: as
`gathered`, but a kernel fetches the kept units (`rlens_jax.ops.ffn_tpu`)."""

BLOCK = 256
"""Tokens that the kernel has in VMEM at a time. It fetches rows while it multiplies the first of such blocks."""
KERNEL_SHARE, FETCH_SHARE = 0.63, 0.24
"""Shares of the peak rates of multiplication and of memory that the kernel reaches. The first is that of its compiled schedule
for v5e (1664 tokens, four shards). The second is assumed: 193 GB/s of v5e's 819, with which its fetches just hide there."""


@dataclass(frozen=True)
class Rates:
    """What a device does in the time that it takes to read one number from memory, in bfloat16 and at published peak rates."""

    multiply_adds: float
    whole_copies: int
    """How often XLA's gather moves the whole matrix: a TPU first brings it on the chip."""
    row_moves: int
    """How often gathered rows move in memory."""


def _tpu(multiply_adds: float, bytes_per_second: float) -> Rates:
    return Rates(multiply_adds / (bytes_per_second / 2), whole_copies=1, row_moves=2)


_V5E, _V5P, _V6E = _tpu(98.5e12, 819e9), _tpu(229.5e12, 2765e9), _tpu(459e12, 1640e9)
RATES: Mapping[str, Rates] = MappingProxyType(
    {
        "gpu": Rates(200, whole_copies=0, row_moves=3),  # A100 156, H100 295; rows are read, written and read
        "TPU v5 lite": _V5E,
        "TPU v5e": _V5E,
        "TPU v5": _V5P,
        "TPU v5p": _V5P,
        "TPU v6 lite": _V6E,
        "TPU v6e": _V6E,
    }
)
"""By the kind of the device, or its platform."""


@dataclass(frozen=True)
class Work:
    """One call of a reduced FFN on a shard: samples, tokens of each, and the shard's units, of which it keeps `kept`."""

    batch: int
    text: int
    probes: int
    visual: int
    units: int
    kept: int

    def cost(self, way: FfnWay, rates: Rates) -> float:
        """The time of a way, in that of `units` multiply-adds with each of the three matrices; text and probes included."""
        if way == "masked":
            return self._through_all(self.text + self.visual, rates)
        before, kept = self._through_all(self.text + self.probes, rates), self.batch * self.kept
        if way == "gathered":
            moved = rates.whole_copies * self.units + rates.row_moves * kept
            return before + moved * rates.multiply_adds + kept * self.visual
        fetched, first = rates.multiply_adds / FETCH_SHARE, min(BLOCK, self.visual)
        return before + kept * (max(fetched, first / KERNEL_SHARE) + (self.visual - first) / KERNEL_SHARE)

    def _through_all(self, tokens: int, rates: Rates) -> float:
        """All samples share one pass, which multiplies while it reads."""
        return self.units * max(rates.multiply_adds, self.batch * tokens)


@dataclass(frozen=True)
class Ways:
    """The ways that a layer can take, and what decides between several."""

    possible: tuple[FfnWay, ...]
    rates: Rates | None = None

    def suited(self, work: Work) -> FfnWay:
        """The fastest possible way; the first one without rates."""
        rates = self.rates
        return self.possible[0] if rates is None else min(self.possible, key=lambda way: work.cost(way, rates))


GATHERED, MASKED, FETCHED = Ways(("gathered",)), Ways(("masked",)), Ways(("kernel",))


def ways_on(device: Any, form: FfnForm, dtype: DTypeLike, path: FfnPath) -> Ways:
    """The ways of units that a device stores in this form; a `path` other than auto leaves that way alone.

    Units in float32, and on devices whose rates are not known, are gathered: a CPU gains nothing by other ways.
    """
    if path != "auto":
        return Ways((path,))
    if form == "halves":
        return Ways(("kernel", "masked"), RATES.get(device.device_kind))
    rates = RATES.get(device.device_kind, RATES.get(device.platform))
    return GATHERED if rates is None or jnp.dtype(dtype) != jnp.bfloat16 else Ways(("gathered", "masked"), rates)
