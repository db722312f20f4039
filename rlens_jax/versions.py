"""The versions that are recorded with every result."""

import platform
from importlib.metadata import version

from rlens_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors", "pillow", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of all `PACKAGES`."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "rlens_jax": __version__, **packages}
