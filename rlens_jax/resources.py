"""What comes with the package: its files (next to it in the repository, inside it in a wheel), and its version and others."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from rlens_jax import __version__
from rlens_jax.errors import UserError, suggest

_PACKAGE = Path(__file__).parent
_RECORDED = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors", "pillow", "orbax-checkpoint")


def _folder(name: str) -> Path:
    """A folder inside the installed package, or next to it in the repository."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def preset_path(name: str) -> Path:
    """The YAML file of the preset `name`. UserError, with the nearest name, if there is none."""
    folder = _folder("configs")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"no preset is called {name!r}{suggest(name, names)}; there are {', '.join(names)}")
    return folder / f"{name}.yaml"


def benchmark_sizes() -> Path:
    """The table of the sizes of benchmarks, for a dry run without data."""
    return _folder("configs") / "benchmark_sizes.json"


def embedded_model() -> Path:
    """The folder of the model that comes with the package. UserError if it is missing."""
    folder = _folder("checkpoints") / "embedded"
    if not folder.is_dir():
        raise UserError(f"{folder}: the embedded model is missing; reinstall the package or name another model")
    return folder


def embedded_plan() -> Path:
    """The best plan for it that loses at most 1 %, as `rlens_jax.rank` found it (docs/results.md)."""
    return embedded_model() / "plan.json"


def cache_folder() -> Path:
    """Default folder for prepared datasets and compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlens_jax"


def versions() -> dict[str, str]:
    """The versions that are recorded with every result: of Python, of this package, and of the packages it computes with."""
    packages = {package: version(package) for package in _RECORDED}
    return {"python": platform.python_version(), "rlens_jax": __version__, **packages}
