"""Starts JAX: precision, the cache of compiled programs, a device."""

import os
import stat
from collections import Counter
from pathlib import Path

import jax

from rlens_jax.config import ComputeConfig
from rlens_jax.errors import UserError
from rlens_jax.hosts.processes import Processes
from rlens_jax.resources import cache_folder


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
    cache = _own_folder(compilation_cache or cache_folder() / "compiled")
    jax.config.update("jax_default_matmul_precision", matmul_precision)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # Small programs too, so that a restart compiles nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX finds no usable device ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU") from None
    return CompilationCounter()


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


def start(compute: ComputeConfig, output: Path, processes: Processes) -> CompilationCounter:
    """Start JAX as `start_jax`; the compilation cache is the configured one, or one that all processes see.

    JAX lets only process 0 write compiled programs. The other processes read them from the shared output folder.
    """
    shared = cache_folder() if processes.count == 1 else output
    return start_jax(compute.matmul_precision, Path(compute.compilation_cache or shared / "compiled"))
