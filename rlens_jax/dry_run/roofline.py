"""An estimate, from the vendor's peak rates, of how long the run would take. Nothing here is measured.

The time of a program is the longer of its arithmetic and its HBM traffic at peak rates, plus what it sends over the interconnect.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlens_jax.dry_run.collectives import Collective
from rlens_jax.dry_run.costs import Cost
from rlens_jax.dry_run.program import CompiledProgram
from rlens_jax.dry_run.topology import Slice
from rlens_jax.dry_run.workload import Phase

LIKELY_SHARE = 0.5
"""Of the roofline's speed, what a run may reach (our assumption; no hardware has shown it)."""

ASSUMPTIONS = (
    "every sample is padded to the bucket that the programs were compiled for; real runs use smaller ones too and take less",
    "later layers win every round of the search, which is the dearest order, and every layer is counted as dense",
    "chips reach their published peak rates in bfloat16 (products in float32 take several passes, which are not counted); a "
    "collective has the links of one axis of the torus",
    f"at {LIKELY_SHARE:.0%} of these rates (a guess, no hardware has shown it) the run takes {1 / LIKELY_SHARE:g} times as long",
    "arithmetic is that of matrix products; Pallas kernels count what their CostEstimate declares, splash attention the blocks "
    "that its map visits and its inputs and outputs",
    "collectives overlap with nothing; compiling, reading data, preparing images on the hosts, moving blocks between work groups "
    "and timing are not counted",
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run at the roofline, all samples in one bucket of the decoder."""

    bucket: str
    seconds: Mapping[str, float]
    """By phase."""
    chips: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def chip_hours(self) -> float:
        return self.total / 3600 * self.chips


@dataclass(frozen=True)
class ProgramTime:
    """Seconds of one program on one device at the roofline."""

    fixed: float
    """Of one run, without its layers."""
    layer: float
    """Of one layer; 0 for a program without a loop over layers."""
    layers: int

    @property
    def run(self) -> float:
        """One run with all layers."""
        return self.fixed + self.layers * self.layer


def roofline_seconds(cost: Cost, link_bytes: float, where: Slice) -> float:
    """Time of one device's work at its peak rates."""
    return max(cost.flops / where.flops, cost.bytes / where.memory_rate) + link_bytes / where.link_rate


def link_bytes(collectives: Iterable[Collective]) -> float:
    """Bytes that a device sends in one run of a program whose layers are dense."""
    return sum(item.link_bytes * item.times for item in collectives if not item.branch or item.branch.startswith("0"))


def program_time(program: CompiledProgram, where: Slice) -> ProgramTime:
    """What a program with dense layers takes."""
    run = roofline_seconds(program.dense.total, link_bytes(program.collectives), where)
    layers = program.spec.layers
    if program.dense.layer is None:
        return ProgramTime(run, 0.0, 0)
    in_loop = link_bytes(item for item in program.collectives if item.in_layer_loop) / layers
    layer = roofline_seconds(program.dense.layer, in_loop, where)
    return ProgramTime(max(0.0, run - layers * layer), layer, layers)


def estimates(programs: Sequence[CompiledProgram], phases: Sequence[Phase], where: Slice) -> list[Estimate]:
    """The run's time for each bucket of the decoder; images in the largest bucket of patches that was compiled."""
    by_bucket: dict[str, dict[str, ProgramTime]] = defaultdict(dict)
    image_seconds = 0.0
    for program in programs:
        time = program_time(program, where)
        if program.spec.name == "encode":
            image_seconds = max(image_seconds, time.run / program.spec.rows)
        else:
            by_bucket[program.spec.bucket][program.spec.name] = time
    return [
        Estimate(bucket, {phase.name: _phase_seconds(phase, image_seconds, times) for phase in phases}, where.chips)
        for bucket, times in by_bucket.items()
    ]


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
