"""Start-up of JAX: matmul precision, the persistent compilation cache, and a count of compilations."""

from collections import Counter
from pathlib import Path

import jax

from rlens_jax.errors import UserError

_CACHE_MISS = "/jax/compilation_cache/cache_misses"


class CompilationCounter:
    """Counts the programs that XLA compiled, without those that the persistent cache had."""

    def __init__(self) -> None:
        self._events: Counter[str] = Counter()
        jax.monitoring.register_event_listener(lambda event, **_: self._events.update([event]))

    @property
    def compiled(self) -> int:
        return self._events[_CACHE_MISS]


def start_jax(matmul_precision: str, compilation_cache: Path) -> CompilationCounter:
    """Set matmul precision and compilation cache, and check that JAX has a device.

    Raises:
        UserError: there is no usable device, or the cache folder cannot be created.
    """
    try:
        compilation_cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{compilation_cache}: the compilation cache cannot be created ({error.strerror}); "
            "choose another folder with --compute.compilation_cache"
        ) from None
    jax.config.update("jax_default_matmul_precision", matmul_precision)
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    # Small programs too, so that a restart compiles nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX finds no usable device ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU") from None
    return CompilationCounter()
