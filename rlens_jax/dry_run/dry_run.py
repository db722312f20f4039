"""The dry run of a configuration: compile its programs for a TPU slice, estimate the run, suggest changes.

The estimate is a roofline from the vendor's peak rates; nothing is measured. The time of a program is its arithmetic or its HBM
traffic at peak rates, whichever takes longer, plus the time to send its collectives.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from rlens_jax.checkpoints.checkpoint import kind_in
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.checkpoints.published import CONFIG
from rlens_jax.config import RunConfig
from rlens_jax.dry_run.costs import Cost, bytes_sent
from rlens_jax.dry_run.program import CompiledProgram, Program, assumed_slots, compile_program, program_specs
from rlens_jax.dry_run.topology import Slice, slice_devices
from rlens_jax.dry_run.workload import Phase, Sizes, Workload, workload
from rlens_jax.engine.choices import with_dtype
from rlens_jax.engine.sizes import fitting_batch_size
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.sharding.mesh import check_fits, make_mesh

LIKELY_SHARE = 0.5
"""Share of the roofline's speed that a run may reach (our assumption; not measured on hardware)."""

ASSUMPTIONS = (
    "Every sample is padded to the bucket shown. A real run also uses smaller buckets and takes less time.",
    "Sizes of buckets that are open are those of the preset of the model's family; a real run chooses them from its samples.",
    "The later layer wins every round of the search: no order costs more. Every layer counts as dense.",
    "Chips reach their published peak rates in bfloat16; the extra passes of float32 products are not counted. A collective "
    "uses the links of one axis of the torus.",
    f"At {LIKELY_SHARE:.0%} of these rates the run takes {1 / LIKELY_SHARE:g} times as long. This share is a guess; it has not "
    "been measured.",
    "Only matrix products count as arithmetic. A Pallas kernel counts as its CostEstimate declares; splash attention counts "
    "the blocks that its mask visits, its inputs and its outputs.",
    "Collectives do not overlap with other work. Compilation, reading data, preparing images on the hosts, moving blocks "
    "between work groups and timing are not counted.",
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run at the roofline, if all samples are in one bucket of the decoder."""

    bucket: str
    seconds: Mapping[str, float]
    """Seconds by phase."""
    chips: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def chip_hours(self) -> float:
        return self.total / 3600 * self.chips


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    config: RunConfig
    """The configuration, with its batch size filled in."""
    kind: ModelKind
    target: Slice
    mesh_shape: tuple[int, int]
    """Devices along `work` and `model`."""
    programs: tuple[Program, ...]
    workload: Workload
    estimates: tuple[Estimate, ...]
    """One estimate per bucket of the decoder; empty if a program did not compile."""

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def dry_run(config: RunConfig, target: Slice, *, all_buckets: bool, progress: Callable[[str], None]) -> DryRun:
    """Compile the programs of a configuration for a slice. libtpu is loaded into this process.

    Args:
        config: the run.
        target: the slice.
        all_buckets: compile the programs of every bucket, not only of the largest.
        progress: called with a line at each step.

    Raises:
        UserError: the model's config.json is missing or not supported, or devices or model do not divide over the mesh.
    """
    folder = find_model(config.model, weights=False)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: has no {CONFIG}; a dry run needs the checkpoint's {CONFIG}, but no weights")
    kind = kind_in(folder)
    config = with_dtype(config, "tpu")
    jax.config.update("jax_default_matmul_precision", config.compute.matmul_precision)
    devices, shards = slice_devices(target), config.compute.model_shards
    check_fits(kind.config.decoder.sizes, shards)
    mesh = make_mesh(devices, shards)
    bucket = assumed_slots(config.compute, kind).largest
    if not config.compute.batch_size:
        progress("searching for the largest batch size that fits")
        rows = fitting_batch_size(config, kind, mesh, target.memory_limit, bucket)
        config = replace(config, compute=replace(config.compute, batch_size=rows))
    mesh_shape = (len(devices) // shards, shards)
    compute, decoder = config.compute, kind.config.decoder
    block_bytes = bucket.slots * compute.batch_size * decoder.width * jnp.dtype(compute.dtype).itemsize
    counts = workload(config, Sizes(decoder.num_layers, mesh_shape[0], block_bytes))
    programs: list[Program] = []
    for spec in program_specs(config, kind, mesh, all_buckets=all_buckets):
        progress(f"compiling {spec.name} ({spec.bucket})")
        programs.append(compile_program(spec, mesh_shape, counts.resident_bytes, target.memory_limit))
    return DryRun(config, kind, target, mesh_shape, tuple(programs), counts, estimates(programs, counts.phases, target))


@dataclass(frozen=True)
class ProgramTime:
    """Seconds of one program on one device at the roofline, with dense layers."""

    fixed: float
    """Seconds per run outside of the layers."""
    layer: float
    """Seconds per layer; 0 for a program without a loop over layers."""
    layers: int

    @property
    def run(self) -> float:
        """Seconds per run with all layers."""
        return self.fixed + self.layers * self.layer


def roofline_seconds(cost: Cost, link_bytes: float, target: Slice) -> float:
    """Time of one device's work at its peak rates."""
    return max(cost.flops / target.flops, cost.bytes / target.memory_rate) + link_bytes / target.link_rate


def program_time(program: CompiledProgram, target: Slice) -> ProgramTime:
    """Time of a program with dense layers."""
    run = roofline_seconds(program.dense.total, bytes_sent(program.collectives, dense=True), target)
    layers = program.spec.layers
    if program.dense.layer is None:
        return ProgramTime(run, 0.0, 0)
    sent = bytes_sent(program.layer_collectives(dense=True), dense=True) / layers
    layer = roofline_seconds(program.dense.layer, sent, target)
    return ProgramTime(max(0.0, run - layers * layer), layer, layers)


def estimates(programs: Sequence[Program], phases: Sequence[Phase], target: Slice) -> tuple[Estimate, ...]:
    """Time of the run per bucket of the decoder, with all images in the slowest bucket of patches.

    Empty if a program did not compile.
    """
    by_bucket: dict[str, dict[str, ProgramTime]] = defaultdict(dict)
    image_seconds = 0.0
    for program in programs:
        if not isinstance(program, CompiledProgram):
            return ()
        time = program_time(program, target)
        if program.spec.name == "encode":
            image_seconds = max(image_seconds, time.run / program.spec.rows)
        else:
            by_bucket[program.spec.bucket][program.spec.name] = time
    return tuple(
        Estimate(bucket, {phase.name: _phase_seconds(phase, image_seconds, times) for phase in phases}, target.chips)
        for bucket, times in by_bucket.items()
    )


def _phase_seconds(phase: Phase, image_seconds: float, times: Mapping[str, ProgramTime]) -> float:
    total = phase.images * image_seconds
    if "generate" in times:
        return total + phase.steps * times["generate"].run
    layers = times["layers"]
    return (
        total
        + phase.embeddings * times["embed"].run
        + (phase.steps + phase.states_made) * layers.fixed
        + phase.layer_steps * layers.layer
        + phase.steps * times["outcome"].run
    )


def advice(result: DryRun) -> list[str]:
    """Changes to the configuration that would help, each with the field's name; empty if everything fits."""
    devices, sizes = result.target.num_devices, result.kind.config.decoder.sizes
    # Larger sizes of the mesh's `model` axis that divide both the devices and the model.
    shards = [
        n
        for n in range(result.mesh_shape[1] + 1, devices + 1)
        if not (devices % n or sizes["N"] % n or sizes["F"] % n) and (sizes["K"] % n == 0 or n % sizes["K"] == 0)
    ]
    lines = (line for program in result.programs if not program.fits for line in _advice(program, result.config, shards))
    return list(dict.fromkeys(lines))


def _advice(program: Program, config: RunConfig, shards: list[int]) -> list[str]:
    name, lines = program.spec.name, []
    if isinstance(program, CompiledProgram):
        excess = program.memory.total - program.memory.limit
        if excess <= program.memory.resident and config.compute.state_memory_gb:
            lines.append(f"compute.state_memory_gb: lower it by {excess / 1e9:.1f} or more")
    elif not program.out_of_memory:
        return [f"{name}: the compiler failed for another reason than memory, see above"]
    if config.compute.dtype == "float32":
        lines.append("compute.dtype: bfloat16 needs half of the memory")
    if shards:
        lines.append(f"compute.model_shards: {' or '.join(map(str, shards))}, to place less of the model on each device")
    if config.compute.batch_size > 1:
        lines.append(f"compute.batch_size: below {config.compute.batch_size}")
    if name == "encode":
        lines.append("compute.patch_slots: lower the largest size, and limit image sizes in preprocessor_config.json to it")
    else:
        lines.append("compute.visual_slots and compute.text_slots: lower the largest size")
    return lines
