"""The time of a run from compiled programs and the work that was counted: a roofline from the vendor's peak rates.

The time of a program is its arithmetic or its HBM traffic at peak rates, whichever takes longer, plus the time to send its
collectives. Nothing is measured but the time to compile, on this machine.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rlens_jax.dry_run.costs import LAYER_KINDS, Collective, Cost, LayerKind
from rlens_jax.dry_run.program import CompiledProgram, Program, image_bucket, row_bucket
from rlens_jax.dry_run.topology import Slice
from rlens_jax.dry_run.workload import Layers, Phase, SplitLoad, Workload

LIKELY_SHARE = 0.5
"""Share of the roofline's speed that a run may reach (our assumption; not measured on hardware)."""
COMPILED_TOGETHER = 16
"""Programs that a host of a slice compiles side by side, each in the CPU time that it takes here (our assumption)."""


@dataclass(frozen=True)
class Links:
    """Bytes per second that a device sends in a collective."""

    model: float
    """To the devices of its copy of the model."""
    other: float
    """Along the axis `work`, or both axes."""

    def seconds(self, collectives: Collection[Collective], kind: LayerKind) -> float:
        """Time of all runs of these collectives, if all layers are of one kind; one after another."""
        return sum(
            item.link_bytes * item.times / (self.model if item.axis == "model" else self.other)
            for item in collectives
            if item.runs(kind)
        )


@dataclass(frozen=True)
class ProgramTime:
    """Seconds of one program on one device at the roofline."""

    fixed: float
    """Seconds per run outside of the layers."""
    layer: Mapping[LayerKind, float]
    """Seconds per layer by its kind; 0 for a program without a loop over layers."""
    layers: int
    slots: int
    """Slots of the arrays of a work group that it runs on."""

    @property
    def run(self) -> float:
        """Seconds per run with all layers, dense."""
        return self.fixed + self.layers * self.layer["dense"]

    def scaled(self, slots: int) -> "ProgramTime":
        """The time for another number of slots, in proportion."""
        factor = slots / self.slots
        layer = {kind: factor * seconds for kind, seconds in self.layer.items()}
        return ProgramTime(factor * self.fixed, layer, self.layers, slots)


def roofline_seconds(cost: Cost, target: Slice) -> float:
    """Time of one device's work at its peak rates, without collectives."""
    return max(cost.flops / target.flops, cost.bytes / target.memory_rate)


def program_time(program: CompiledProgram, target: Slice, links: Links) -> ProgramTime:
    """Time of a program by the kind of its layers."""
    layers, slots = program.spec.layers, program.spec.slots
    dense = program.costs["dense"]
    run = roofline_seconds(dense.total, target) + links.seconds(program.collectives, "dense")
    if dense.layer is None:
        return ProgramTime(run, dict.fromkeys(LAYER_KINDS, 0.0), 0, slots)
    times = {}
    for kind in LAYER_KINDS:
        cost = program.costs[kind].layer
        assert cost is not None
        times[kind] = roofline_seconds(cost, target) + links.seconds(program.layer_collectives(kind), kind) / layers
    return ProgramTime(max(0.0, run - layers * times["dense"]), times, layers, slots)


@dataclass(frozen=True)
class Times:
    """The times of all programs that compiled, by name, bucket and slots of a work group."""

    programs: Mapping[str, Mapping[str, ProgramTime]]
    trace: float
    """CPU seconds to trace a program, on average."""
    compile: float
    """CPU seconds to compile it."""

    def of(self, name: str, bucket: str, slots: int) -> ProgramTime:
        """The time of a program. That of a bucket that was not compiled is scaled from the one with the nearest slots."""
        known = self.programs[name]
        if bucket in known and known[bucket].slots == slots:
            return known[bucket]
        return min(known.values(), key=lambda time: abs(math.log(time.slots / slots))).scaled(slots)


def program_times(programs: Sequence[Program], target: Slice, links: Links, cpu_seconds: float) -> Times | None:
    """Times of the programs, which took `cpu_seconds` to trace and to compile; None if one did not compile."""
    found: dict[str, dict[str, ProgramTime]] = {}
    traced = 0.0
    for program in programs:
        if not isinstance(program, CompiledProgram):
            return None
        found.setdefault(program.spec.name, {})[program.spec.bucket] = program_time(program, target, links)
        traced += program.trace_seconds
    count = max(1, len(programs))
    return Times(found, traced / count, (cpu_seconds - traced) / count)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run at the roofline."""

    phases: Mapping[str, Mapping[str, float]]
    """Seconds by phase and bucket; the phase `vision` has the vision tower's buckets."""
    compilation: float
    """Seconds to compile all programs, which do not depend on the slice's speed."""
    chips: int

    @property
    def roofline(self) -> float:
        """Seconds on the devices."""
        return sum(sum(buckets.values()) for buckets in self.phases.values())

    @property
    def likely(self) -> float:
        """Seconds of the whole run at `LIKELY_SHARE` of the peak rates."""
        return self.roofline / LIKELY_SHARE + self.compilation


def estimate(work: Workload, times: Times, chips: int) -> Estimate:
    """The time of a run. All work groups run a bucket at the same time, so it takes as long as their fullest block."""
    vision = {
        image_bucket(size): sum(_vision_seconds(work, times, split, size) for split in work.splits.values())
        for size in work.image_sizes
    }
    phases = {"vision": vision}
    for phase in work.phases:
        phases[phase.name] = {
            row_bucket(load.bucket): load.blocks * block_seconds(phase, times, row_bucket(load.bucket), load.block_slots)
            for load in work.splits[phase.split].buckets
        }
    buckets = len({load.bucket for split in work.splits.values() for load in split.buckets})
    count = sum(len(work.image_sizes) if name == "encode" else buckets for name in times.programs)
    compilation = count * times.trace + -(-count // COMPILED_TOGETHER) * times.compile
    return Estimate(phases, compilation, chips)


def _vision_seconds(work: Workload, times: Times, split: SplitLoad, size: tuple[int, ...]) -> float:
    together = work.together(size)
    runs = -(-split.images.get(size, 0) // together)
    return runs * times.of("encode", image_bucket(size), together * math.prod(size)).run


def block_seconds(phase: Phase, times: Times, bucket: str, slots: int) -> float:
    """Seconds of a phase on one block."""
    if "generate" in times.programs:
        return phase.steps * times.of("generate", bucket, slots).run
    layers = times.of("layers", bucket, slots)

    def run(counts: Layers) -> float:
        return sum(number * layers.layer[kind] for kind, number in counts.items())

    return (
        phase.embeddings * times.of("embed", bucket, slots).run
        + (phase.steps + phase.state_runs) * layers.fixed
        + run(phase.layers)
        + run(phase.state_layers)
        + phase.steps * (times.of("last layer", bucket, slots).run + times.of("outcome", bucket, slots).run)
    )
