"""What to change in a configuration that does not fit a slice."""

from collections.abc import Mapping

from rlens_jax.config import RunConfig
from rlens_jax.dry_run.analysis import DryRun
from rlens_jax.dry_run.program import CompiledProgram, Program


def advice(found: DryRun, config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """Changes that would help, each with the field's name; none when everything fits.

    Args:
        found: the dry run.
        config: its configuration.
        sizes: of the decoder by axis letter.
    """
    lines: list[str] = []
    for program in found.programs:
        if not program.fits:
            lines += _for_program(program, config, larger_shards(found, sizes))
    return list(dict.fromkeys(lines))


def larger_shards(found: DryRun, sizes: Mapping[str, int]) -> list[int]:
    """Sizes of the mesh's `model` axis above the present one that divide the devices and the model."""
    return [
        n
        for n in range(found.mesh_shape[1] + 1, found.where.num_devices + 1)
        if not (found.where.num_devices % n or sizes["N"] % n or sizes["F"] % n)
        and (sizes["K"] % n == 0 or n % sizes["K"] == 0)
    ]


def _for_program(program: Program, config: RunConfig, shards: list[int]) -> list[str]:
    name, lines = program.spec.name, []
    if isinstance(program, CompiledProgram):
        over = program.memory.total - program.memory.limit
        if over <= program.memory.resident and config.compute.state_memory_gb:
            lines.append(f"compute.state_memory_gb: lower it by {over / 1e9:.1f} or more")
    elif not program.out_of_memory:
        return [f"{name}: the compiler refuses it for another reason than memory, see above"]
    if config.compute.dtype == "float32":
        lines.append("compute.dtype: bfloat16 takes half of the memory")
    if shards:
        lines.append(f"compute.model_shards: {' or '.join(map(str, shards))}, so that a device holds less of the model")
    if config.compute.batch_size > 1:
        lines.append(f"compute.batch_size: below {config.compute.batch_size}")
    if name == "encode":
        lines.append(
            "compute.patch_slots: a smaller largest size (and a preprocessor_config.json that keeps images to it)"
        )
    else:
        lines.append("compute.visual_slots and compute.text_slots: a smaller largest size")
    return lines
