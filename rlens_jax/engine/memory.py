"""Memory of the devices: how much there is, how many rows fit, and what to say when they did not."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from rlens_jax.errors import UserError

MOST_ROWS = 16
"""Rows that a batch of a work group has at most (our decision): of long prompts more bring no more speed, and fill up worse."""
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(r"(?:[Uu]sed |required for HLO temporaries \()([\d.]+)([KMGT])")


def device_bytes(mesh: Mesh) -> int:
    """Memory of each device of this process; devices simulated on a CPU share the machine's."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(local)


def is_out_of_memory(message: str) -> bool:
    """Whether that is what an error of JAX says."""
    return _EXHAUSTED in message


def bytes_refused(message: str) -> int | None:
    """How much memory a program would need that the compiler for TPUs refused, where its message says it."""
    found = _NEEDED.search(message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def most_rows(needed: Callable[[int], int], available: int) -> int:
    """The largest power of two of rows that fit, up to `MOST_ROWS`.

    The most are tried first: mostly they fit, and what does not, the compiler for TPUs refuses at once.

    Args:
        needed: bytes that the program of so many rows takes on a device; each call compiles one.
        available: bytes of a device.

    Raises:
        UserError: not even one row fits.
    """
    rows = MOST_ROWS
    while (size := needed(rows)) > available:
        if rows == 1:
            raise UserError(
                f"one sample needs {size / 1e9:.1f} GB of a device's {available / 1e9:.1f} GB; raise "
                "compute.model_shards, lower the largest of compute.visual_slots, or compute in bfloat16"
            )
        rows //= 2
    return rows


@contextmanager
def memory_explained(batch_size: int, model_shards: int) -> Iterator[None]:
    """Turns a device's running out of memory into one line.

    Raises:
        UserError: naming the fields that decide how much is needed.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(str(error)):
            raise
        raise UserError(
            f"out of memory with compute.batch_size = {batch_size} and compute.model_shards = {model_shards}; "
            "lower compute.batch_size or compute.state_memory_gb, or raise compute.model_shards"
        ) from None
