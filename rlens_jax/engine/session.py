"""What a configuration names, taken from disk: the samples, and the model on its mesh with all that prepares its inputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.config import RunConfig
from rlens_jax.data.splits import Splits, load_splits
from rlens_jax.engine.batch_size import with_batch_size
from rlens_jax.engine.inputs import Preparer, Shapes
from rlens_jax.engine.memory import device_bytes
from rlens_jax.families.registry import FAMILIES, ModelKind
from rlens_jax.resources import cache_folder
from rlens_jax.sharding.mesh import check_fits, make_mesh


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be given samples."""

    mesh: Mesh
    model: nnx.Module
    """Laid out on the mesh."""
    preparer: Preparer
    chat: Any
    """The preparer's tokenizer."""
    shapes: Shapes


def read_splits(config: RunConfig, model_type: str, *, step_by_step: bool) -> Splits:
    """The samples of a configuration; arguments and errors as of `load_splits`."""
    data = config.data
    return load_splits(
        data.source,
        Path(data.cache or cache_folder() / "data"),
        validation_samples=data.validation_samples,
        test_samples=data.test_samples,
        held_out_share=data.held_out_share,
        seed=config.seed,
        benchmarks=data.benchmarks,
        family=model_type,
        step_by_step=step_by_step,
    )


def load(config: RunConfig, folder: Path, kind: ModelKind) -> Loaded:
    """The model of a configuration on all devices; `folder` is its folder and `kind` what that describes.

    Raises:
        UserError: the mesh fits neither devices nor model, not one row fits into memory, or the folder cannot be used.
    """
    compute, decoder = config.compute, kind.config.decoder
    check_fits(decoder.sizes, compute.model_shards)
    mesh = make_mesh(jax.devices(), compute.model_shards)
    batch_size = with_batch_size(config, kind, mesh, device_bytes(mesh)).compute.batch_size
    _, model = load_model(folder, jnp.dtype(compute.dtype), mesh=mesh)
    preparer = FAMILIES[kind.model_type].preparer(folder, kind.config, compute.patch_slots)
    shapes = Shapes(compute.text_slots, compute.visual_slots, batch_size, decoder.context)
    return Loaded(mesh, model, preparer, preparer.chat, shapes)
