"""Tests run offline, with strict JAX on eight simulated CPU devices and a temporary cache folder.

The annotations of arrays are checked when a function is called.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# These must be set before the imports below.
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "agg"}
# The models are tiny: the threads of OpenMP spend most of their time waiting for each other, at full load.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the tests' time is spent compiling, and the compiled code computes little.
# The emitters of fusions and the parts of a module, which compile side by side, take longest.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "rlens_jax"
ANNOTATED = [file for file in sorted(PACKAGE.rglob("*.py")) if "from jaxtyping import" in file.read_text()]
# The other modules have plain types, which mypy checks; checks cost time.
names = (".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in ANNOTATED)
install_import_hook([name.removesuffix(".__init__") for name in names], "tests.typechecked")

jax.config.update("jax_platforms", "cpu")
# Not through XLA_FLAGS: processes that tests start inherit those, and have one device each.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


PLAIN_INSTALL = str(Path(__file__).parent / "plain_install")


def pytest_configure(config: pytest.Config) -> None:
    """Make the cache folder; the workers of xdist start later and inherit it. Processes that tests start see no torch."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # Some tests hand on their own path, others the variable.
        sys.path.insert(0, PLAIN_INSTALL)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PLAIN_INSTALL, os.environ.get("PYTHONPATH")]))
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="rlens_jax_tests_")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait for processes that they started."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files with slow tests first: a long file that starts last leaves the other workers idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Collect garbage rarely: JAX's tracing makes many objects and few cycles. What the imports made is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Let a command in the tests' process see one device, as it would in its own process; it compiles as fast there."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        patch.setattr(jax, "local_devices", lambda: devices)
        yield
