"""A model folder against a bundle, from start to finish."""

from pathlib import Path

import jax.numpy as jnp

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.console import Progress
from rlens_jax.errors import UserError
from rlens_jax.hosts.startup import start_jax
from rlens_jax.parity.bundle import read_manifest
from rlens_jax.parity.compare import compare
from rlens_jax.parity.parity_report import Validation
from rlens_jax.resources import cache_folder
from rlens_jax.versions import versions


def validate(model: str, bundle: Path, dtype: str, tolerance: float) -> Validation:
    """Compares all cases of a bundle, with matrix products in the highest precision.

    Args:
        model: a model folder, or "embedded".
        bundle: the bundle's folder.
        dtype: of our weights and computation.
        tolerance: relative to max(1, largest reference logit).

    Raises:
        UserError: model or bundle cannot be used, or they do not fit each other.
    """
    if not 0 < tolerance < float("inf"):
        raise UserError(f"--tolerance must be a positive number, not {tolerance}")
    manifest = read_manifest(bundle)
    start_jax("highest", cache_folder() / "compiled")
    kind, loaded = load_model(model, jnp.dtype(dtype))
    with Progress("comparing", len(manifest.cases), "cases") as shown:
        results = compare(manifest, kind, loaded, tolerance, shown.advance)
    num_layers = kind.config.decoder.num_layers
    return Validation(model, dtype, num_layers, manifest, tolerance, results, versions())
