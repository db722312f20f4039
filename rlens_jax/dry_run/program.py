"""Compiles one program for a slice and reads off what a device needs: memory, arithmetic, traffic and collectives."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from rlens_jax.dry_run.collectives import Collective, find_collectives
from rlens_jax.dry_run.costs import Cost, ProgramCost, program_cost, reduced, unreduced
from rlens_jax.dry_run.hlo import parse_module
from rlens_jax.dry_run.loops import LoopCounts, Loops
from rlens_jax.engine.memory import bytes_refused, is_out_of_memory


@dataclass(frozen=True)
class ProgramSpec:
    """A program that is to be compiled."""

    name: str
    bucket: str
    """Its static shapes in words, such as "text 1024, visual 2048"."""
    lower: Callable[[], jax.stages.Lowered]
    layers: int
    """Iterations of its loop over layers; 0 when it has none."""
    rows: int
    """Samples, or images, that one run of it takes."""
    held_bytes: int
    """On a device: all of the model, and this program's inputs. A program's own arguments leave out weights that it does not
    read, but they stay where they are."""
    steps: int = 1
    """Iterations of a loop around its loop over layers: decoding steps."""
    kernel_flops: tuple[int, int] = (0, 0)
    """Of one layer on a device, dense and reduced: arithmetic of Pallas kernels that declare none (splash attention)."""
    beside_states: bool = False
    """Whether the run keeps its batches and base states in memory while it runs."""


@dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes."""

    arguments: int
    """Weights and inputs."""
    temporaries: int
    outputs: int
    """Without those that are written over arguments."""
    resident: int
    """What the run keeps beside the program: the model's other weights, and base states of other batches."""
    limit: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.resident

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class CompiledProgram:
    """A program as compiled for one device of the slice."""

    spec: ProgramSpec
    memory: Memory
    dense: ProgramCost
    """Every layer dense."""
    reduced: ProgramCost
    """Every layer with both reductions."""
    collectives: tuple[Collective, ...]
    xla_flops: float
    """What XLA's own cost analysis says: bodies of loops counted once, elementwise work counted too."""
    xla_bytes: float
    code_bytes: int
    """Size of the compiled program."""
    seconds: float
    """Time that compiling took here."""

    @property
    def fits(self) -> bool:
        return self.memory.fits


@dataclass(frozen=True)
class Refused:
    """A program that the compiler does not make."""

    spec: ProgramSpec
    reason: str
    """In one line."""
    needed: int | None
    """Bytes of HBM that it would need, where that is the reason and the compiler says it."""
    out_of_memory: bool
    seconds: float

    @property
    def fits(self) -> bool:
        return False


Program = CompiledProgram | Refused


def compile_program(
    spec: ProgramSpec, mesh_shape: tuple[int, int], *, resident_bytes: int, memory_limit: int
) -> Program:
    """Compile one program and read it; the compiler's refusal is an answer too.

    Args:
        spec: the program.
        mesh_shape: devices along `work` and `model`.
        resident_bytes: memory of a device that the run takes beside programs of the search.
        memory_limit: of a device.
    """
    lowered = spec.lower()
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(spec, str(error), time.monotonic() - began)
    seconds = time.monotonic() - began
    text: Any = compiled.as_text()
    module = parse_module(text)
    loops = Loops(module, LoopCounts(spec.layers, spec.steps))
    sizes: Any = compiled.memory_analysis()
    own: Any = compiled.cost_analysis()
    idle = max(0, spec.held_bytes - sizes.argument_size_in_bytes)
    return CompiledProgram(
        spec=spec,
        memory=Memory(
            sizes.argument_size_in_bytes,
            sizes.temp_size_in_bytes,
            sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            idle + (resident_bytes if spec.beside_states else 0),
            memory_limit,
        ),
        dense=with_kernels(program_cost(module, loops, unreduced), spec.layers, spec.kernel_flops[0]),
        reduced=with_kernels(program_cost(module, loops, reduced), spec.layers, spec.kernel_flops[1]),
        collectives=tuple(find_collectives(module, loops, mesh_shape)),
        xla_flops=own["flops"],
        xla_bytes=own["bytes accessed"],
        code_bytes=sizes.generated_code_size_in_bytes,
        seconds=seconds,
    )


def with_kernels(cost: ProgramCost, layers: int, flops: int) -> ProgramCost:
    """A program's cost with the arithmetic of each layer's kernels that the compiled text does not tell of."""
    layer = None if cost.layer is None else cost.layer + Cost(flops, 0)
    return ProgramCost(cost.total + Cost(flops * layers, 0), layer)


def refusal(spec: ProgramSpec, message: str, seconds: float) -> Refused:
    """What the compiler's message says, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = lines[0] if lines else "no reason given"
    return Refused(spec, reason, bytes_refused(message), is_out_of_memory(message), seconds)


def of_one_layer(collectives: Iterable[Collective], *, dense: bool) -> list[Collective]:
    """Those in the loop over layers that a dense layer runs, or a reduced one."""
    return [
        item for item in collectives if item.in_layer_loop and (not item.branch or item.branch.startswith("0") == dense)
    ]
