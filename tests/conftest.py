"""Strict JAX on eight simulated CPU devices, offline, with a cache folder of this run only."""

import os
import tempfile
from collections.abc import Iterator

import pytest

# These must be set before the imports below.
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "agg"}
# Most of the tests' time is spent compiling, and the compiled code computes little.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax

jax.config.update("jax_platforms", "cpu")
# Not through XLA_FLAGS, which processes that tests start inherit: they have one device each.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """The workers of xdist start later and inherit the folder."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="rlens_jax_tests_")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """A command that runs in the tests' process sees one device, as in a process of its own, and compiles as fast."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        yield
