"""Which versions computed a result, for the records that are kept beside it."""

import platform
from collections.abc import Iterable
from importlib.metadata import version

from rlens_jax import __version__


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, of this package, and of the installed `packages`."""
    return {
        "python": platform.python_version(),
        "rlens_jax": __version__,
        **{package: version(package) for package in packages},
    }
