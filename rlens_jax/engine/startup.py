"""Starts JAX: precision, the cache of compiled programs, a device."""

import os
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path

import jax

from rlens_jax import stores
from rlens_jax.config import ComputeConfig
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes
from rlens_jax.mirrors import address_of, files_under, place, size
from rlens_jax.resources import cache_folder

_UNSET = -1
"""Of JAX's number of CPU devices."""
_XLA_DEVICES = "xla_force_host_platform_device_count"


class CompilationCounter:
    """Counts the programs that XLA compiled, without those that the persistent cache had."""

    def __init__(self) -> None:
        self._events: Counter[str] = Counter()
        jax.monitoring.register_event_listener(lambda event, **_: self._events.update([event]))

    @property
    def compiled(self) -> int:
        return self._events["/jax/compilation_cache/cache_misses"]


def start_jax(matmul_precision: str = "highest", compilation_cache: Path | None = None) -> CompilationCounter:
    """Set matmul precision and the persistent compilation cache (default: the user's), and check that JAX has a device.

    Raises:
        UserError: there is no usable device, or the cache folder cannot be created or can be written by others.
    """
    cache = compilation_cache or cache_folder() / "compiled"
    address = address_of(cache)
    jax.config.update("jax_default_matmul_precision", matmul_precision)
    jax.config.update("jax_compilation_cache_dir", str(_own_folder(cache)) if address is None else _writable(address))
    # Small programs too, so that a restart compiles nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX finds no usable device ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU") from None
    return CompilationCounter()


def _divide_cpu(devices: int) -> None:
    """Let JAX see the CPU as several devices, unless it was started, or their number was set, before."""
    if jax.config.values["jax_num_cpu_devices"] == _UNSET and _XLA_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", devices)


def chosen_cpu_devices(compute: ComputeConfig, model_bytes: int, cores: int, memory: int) -> int:
    """The configured number of devices, or one per core, as far as a quarter of the memory holds their copies of the model.

    In a program for all cores at once, the cores wait for each other after every small part; devices of their own compute rows of
    their own. The devices of a model that is cut (`model_shards`) must be configured.

    Args:
        compute: the configuration.
        model_bytes: of the published files; in float32 it takes twice as much.
        cores: of this process.
        memory: of the machine, in bytes.
    """
    if compute.cpu_devices or compute.model_shards > 1:
        return max(1, compute.cpu_devices)
    return max(1, min(cores, memory // (4 * 2 * max(1, model_bytes))))


def _own_folder(cache: Path) -> Path:
    """The folder of the compilation cache, made for its user alone: compiled programs are code that is run when it is read."""
    other = "choose another folder with --compute.compilation_cache"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.mkdir(mode=0o700, exist_ok=True)
        status = cache.stat()
    except OSError as error:
        raise UserError(f"{cache}: the compilation cache cannot be created ({error.strerror}); {other}") from None
    if status.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{cache}: the compilation cache belongs to another user, who could put programs into it; {other}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{cache}: other users can put programs into the compilation cache; run chmod go-w on it, or {other}")
    return cache


def _writable(address: str) -> str:
    """The address of the compilation cache, where JAX itself would only warn of each program. UserError if it cannot be written.

    Whoever may write there can put programs into the cache.
    """
    stores.put(f"{address}/.writable", b"")
    return address


def start(compute: ComputeConfig, output: Path, processes: Processes, model: Path) -> CompilationCounter:
    """Start JAX as `start_jax` for a search with the model of a folder, on a CPU with one device per core.

    The compilation cache is the configured one, or one that all processes see.

    JAX lets only process 0 write compiled programs. The other processes read them from the shared output folder.
    """
    if processes.count == 1:
        published = size(*files_under(model))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _divide_cpu(chosen_cpu_devices(compute, published, len(os.sched_getaffinity(0)), memory))
    shared = cache_folder() if processes.count == 1 else output
    return start_jax(compute.matmul_precision, place(compute.compilation_cache or shared / "compiled"))
