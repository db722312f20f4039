"""The dry run of a configuration, from its model's config.json to what a person reads. Runs where libtpu may be loaded."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlens_jax.checkpoints.checkpoint import CONFIG, find_model, read_model_kind
from rlens_jax.config import RunConfig
from rlens_jax.dry_run.analysis import dry_run
from rlens_jax.dry_run.dry_run_report import document, terminal
from rlens_jax.dry_run.request import Request
from rlens_jax.dry_run.specs import program_specs
from rlens_jax.dry_run.topology import slice_devices
from rlens_jax.dry_run.workload import Sizes, workload
from rlens_jax.engine.batch_size import with_batch_size
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.sharding.mesh import check_fits, make_mesh


def dry_run_of(config: RunConfig, request: Request, progress: Callable[[str], None]) -> tuple[str, str]:
    """The text for the terminal and that of the JSON file.

    Raises:
        UserError: the model's config.json is missing or not supported, or the mesh does not divide devices or model.
    """
    folder = find_model(config.model)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: has no {CONFIG}; a dry run needs that of the model's checkpoint, but no weights")
    kind = read_model_kind(folder)
    jax.config.update("jax_default_matmul_precision", config.compute.matmul_precision)
    devices = slice_devices(request.where)
    check_fits(kind.config.decoder.sizes, config.compute.model_shards)
    mesh = make_mesh(devices, config.compute.model_shards)
    if not config.compute.batch_size:
        progress("looking for the batch size that fits")
        config = with_batch_size(config, kind, mesh, request.where.memory_limit)
    specs = program_specs(config, kind, mesh, all_buckets=request.all_buckets)
    shards = config.compute.model_shards
    mesh_shape = (len(devices) // shards, shards)
    found = dry_run(specs, request.where, mesh_shape, workload(config, _sizes(config, kind, mesh_shape[0])), progress)
    return terminal(found, config, kind), document(found, config, kind)


def _sizes(config: RunConfig, kind: ModelKind, groups: int) -> Sizes:
    """Of batches in the largest bucket."""
    compute, decoder = config.compute, kind.config.decoder
    slot_bytes = compute.batch_size * decoder.width * jnp.dtype(compute.dtype).itemsize
    slots = compute.text_slots[-1] + compute.visual_slots[-1]
    return Sizes(num_layers=decoder.num_layers, groups=groups, block_bytes=slots * slot_bytes)
