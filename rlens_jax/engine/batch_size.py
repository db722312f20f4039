"""How many rows a batch of a work group has, when the configuration leaves it open: as many as fit into a device's memory."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from rlens_jax.config import RunConfig
from rlens_jax.engine.abstract import abstract_model, bytes_on_device, decoder_arguments
from rlens_jax.engine.memory import bytes_refused, is_out_of_memory, most_rows
from rlens_jax.engine.programs import Programs
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket


def with_batch_size(config: RunConfig, kind: ModelKind, mesh: Mesh, available: int) -> RunConfig:
    """The configuration with `compute.batch_size` filled in.

    The program with the largest temporaries, `layers` (or `generate`), is compiled for the largest bucket, and what XLA says of
    its memory tells whether it fits beside the weights and the base states (our decision).

    Args:
        config: of the run.
        kind: the model.
        mesh: the devices, real or of a slice to compile for.
        available: bytes of a device.

    Raises:
        UserError: not even one row fits.
    """
    compute = config.compute
    if compute.batch_size:
        return config
    model = abstract_model(kind, compute.dtype, mesh)
    weights = bytes_on_device(nnx.state(model))
    programs = Programs(model, mesh, config.reduction, seed=0, new_tokens=config.search.max_new_tokens, stop_token=0)
    name = "layers" if config.search.objective == "teacher_forced" else "generate"
    bucket = Bucket(compute.text_slots[-1], compute.visual_slots[-1])

    def needed(rows: int) -> int:
        arguments: Any = decoder_arguments(programs, bucket, rows * programs.groups)[name]
        held = weights + bytes_on_device(arguments)
        lowered = programs.lower(name, *arguments)
        try:
            sizes: Any = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            # The compiler for TPUs refuses what cannot fit, and mostly says how much it would need.
            if not is_out_of_memory(str(error)):
                raise
            return held + (bytes_refused(str(error)) or available)
        return held + sizes.temp_size_in_bytes + sizes.output_size_in_bytes + int(compute.state_memory_gb * 1e9)

    return replace(config, compute=replace(compute, batch_size=most_rows(needed, available)))
