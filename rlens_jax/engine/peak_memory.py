"""The most memory that a computation takes, by what the machine can tell."""

import gc
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

Source = Literal["device", "analysis", "resident", "resident since start"]
"""The device's statistics, the memory analysis of the compiled programs, or the resident memory of the process."""
_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
"""Of clear_refs: the maximum becomes the present value."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes, and where the number comes from."""

    bytes: int
    source: Source


def peak_memory(run: Callable[[], Any], analyses: Callable[[], list[Any]]) -> PeakMemory:
    """The most memory in use while `run` runs; compile before.

    A device tells the maximum since its process started. So it tells that of `run` only if it rises. Otherwise the compiled
    programs are asked: the largest sum of their arguments, parameters included, results and intermediates.

    Args:
        run: the computation.
        analyses: makes the memory analysis of each of its compiled programs.
    """
    if jax.default_backend() == "cpu":
        return _resident(run)
    before = device_peak()
    jax.block_until_ready(run())
    after = device_peak()
    if before is not None and after is not None and after > before:
        return PeakMemory(after, "device")
    return PeakMemory(max(map(_needed, analyses())), "analysis")


def _needed(sizes: Any) -> int:
    parts = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.temp_size_in_bytes
    return sum(parts) - int(sizes.alias_size_in_bytes)


def device_peak() -> int | None:
    """The most bytes in use so far on a device of this process, None if the devices tell nothing."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((int(peak) for peak in peaks if peak is not None), default=None)


def _resident(run: Callable[[], Any]) -> PeakMemory:
    gc.collect()
    is_reset = False
    with suppress(OSError):  # not Linux, or the process may not
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        is_reset = True
    jax.block_until_ready(run())
    if is_reset:
        lines = (_PROCESS / "status").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        return PeakMemory(1024 * int(kibibytes), "resident")
    return PeakMemory(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "resident since start")
