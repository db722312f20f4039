"""The devices of this machine: what they are, whether they reach each other, and whether compiled programs are kept."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.errors import UserError, foreign
from rlens_jax.sharding.mesh import one_kind

COLLECTIVE_BYTES = 16 << 20
"""Of each device's array in the timed collectives."""


@dataclass(frozen=True)
class Collective:
    """An exchange between all devices; `seconds` is the least of three."""

    name: str
    devices: int
    bytes: int
    right: bool
    seconds: float | None
    error: str | None = None


@dataclass(frozen=True)
class CacheCheck:
    """Whether a compiled program was written to the compilation cache, and read from it."""

    folder: str
    written: bool
    read: bool


def describe_devices() -> dict[str, Any]:
    """Platform, kind, number and memory of the devices.

    Raises:
        UserError: the devices are of different kinds, for which no program is made.
    """
    devices = jax.devices()
    kind = one_kind(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return {
        "platform": devices[0].platform,
        "kind": kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "memory_bytes": min((int(limit) for limit in limits if limit), default=None),
    }


def check_collectives() -> list[Collective]:
    """A sum and a gather over all devices; none with one device."""
    devices = jax.devices()
    if len(devices) == 1:
        return []
    mesh, length = Mesh(np.array(devices), ("all",)), COLLECTIVE_BYTES // 4
    rows = NamedSharding(mesh, PartitionSpec("all"))
    numbers = jax.make_array_from_callback((len(devices),), rows, lambda at: np.arange(len(devices), dtype=np.float32)[at])
    arrays = jax.jit(lambda numbers: numbers[:, None] + jnp.zeros((1, length)), out_shardings=rows)(numbers)
    total = float(sum(range(len(devices))))
    gathered = np.arange(len(devices), dtype=np.float32)
    return [
        _collective("sum", mesh, arrays, lambda x: jax.lax.psum(x, "all"), np.array([total], np.float32)),
        _collective("gather", mesh, arrays, lambda x: jax.lax.all_gather(x, "all", tiled=True), gathered),
    ]


def _collective(name: str, mesh: Mesh, arrays: Any, exchange: Any, expected: np.ndarray) -> Collective:
    found = partial(Collective, name, len(mesh.devices), COLLECTIVE_BYTES)
    run = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec(), check_vma=False))
    try:
        with foreign(name):
            result = run(arrays)
            own = np.asarray(result.addressable_data(0))
            ((*seconds,),) = time_side_by_side([lambda: run(arrays)], 3)
    except UserError as error:
        return found(False, None, str(error))
    return found(bool((own == expected[:, None]).all()), min(seconds))


def check_cache() -> CacheCheck:
    """Compile a program that nobody has compiled before, forget it, and compile it again."""
    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    unique = float(time.time())

    def compile_once() -> None:
        jax.jit(lambda x: x * unique).lower(jnp.ones(3)).compile()

    compile_once()
    missed = events["/jax/compilation_cache/cache_misses"]
    jax.clear_caches()
    compile_once()
    hits = events["/jax/compilation_cache/cache_hits"]
    return CacheCheck(str(jax.config.values["jax_compilation_cache_dir"]), missed > 0, hits > 0)
