"""Start-up of JAX for a run: devices, precision, the persistent compilation cache, and a count of compilations."""

from collections import Counter
from pathlib import Path

import jax

from rlens_jax.errors import UserError

_MISS = "/jax/compilation_cache/cache_misses"


class CompilationCounter:
    """Counts programs that XLA compiled anew; those that the persistent cache had do not count."""

    def __init__(self) -> None:
        self._events: Counter[str] = Counter()
        jax.monitoring.register_event_listener(lambda event, **_: self._events.update([event]))

    @property
    def compiled(self) -> int:
        return self._events[_MISS]


def start_jax(matmul_precision: str, compilation_cache: Path) -> CompilationCounter:
    """Set precision and compilation cache, and make sure that JAX has a device.

    Raises:
        UserError: no usable device, or the cache folder cannot be made.
    """
    try:
        compilation_cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{compilation_cache}: the compilation cache cannot be made ({error.strerror}); "
            "name another folder with --compute.compilation_cache"
        ) from None
    jax.config.update("jax_default_matmul_precision", matmul_precision)
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    # Small programs too: a restart is to compile nothing at all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"JAX finds no usable device ({reason}); set JAX_PLATFORMS=cpu to compute on the CPU") from None
    return CompilationCounter()
