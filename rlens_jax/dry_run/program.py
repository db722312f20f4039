"""The programs of a ranking run: their abstract inputs, and what the compiler says about their memory, work and collectives.

The inputs come from a configuration and a config.json alone: no array is allocated and no weight is read.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from rlens_jax.config import RunConfig
from rlens_jax.dry_run.costs import LAYER_KINDS, Collective, Cost, LayerKind, ProgramCost, find_collectives, program_cost
from rlens_jax.dry_run.hlo import Loops, parse_module
from rlens_jax.engine.choices import dtype_on
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.sizes import (
    abstract_images,
    abstract_model,
    bytes_on_device,
    bytes_refused,
    decoder_arguments,
    is_out_of_memory,
)
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import ImageSize
from rlens_jax.ops.attention_tpu import kernel_flops


@dataclass(frozen=True)
class ProgramSpec:
    """A program to compile."""

    name: str
    bucket: str
    """Its static shapes in words, such as "text 1024, visual 2048"."""
    lower: Callable[[], jax.stages.Lowered]
    layers: int
    """Iterations of its loop over layers; 0 if it has none."""
    rows: int
    """Rows, or images, per run."""
    slots: int
    """Text and visual slots, or patches, of a work group per run."""
    held_bytes: int
    """Bytes on a device of the whole model and of this program's inputs. The compiled program's arguments leave out weights that
    it does not read, but those stay in memory."""
    steps: int = 1
    """Iterations of a loop around its loop over layers: decoding steps."""
    kernel_flops: tuple[int, int] = (0, 0)
    """FLOPs per layer and device, without and with Hollow Attention, of kernels that declare none (splash attention)."""
    keeps_states: bool = False
    """Whether the run keeps its batches and base states in memory while the program runs."""


@dataclass(frozen=True)
class Memory:
    """HBM of one device, in bytes."""

    arguments: int
    """Weights and inputs that the program reads."""
    temporaries: int
    outputs: int
    """Outputs that are not written over arguments."""
    resident: int
    """Data that stay in memory while the program runs: the model's other weights, and base states of other batches."""
    limit: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.resident


@dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for one device of the slice."""

    spec: ProgramSpec
    memory: Memory
    costs: Mapping[LayerKind, ProgramCost]
    """Cost with every layer of one kind."""
    collectives: tuple[Collective, ...]
    xla_flops: float
    """FLOPs of XLA's own cost analysis, which counts the bodies of loops once and elementwise work too."""
    xla_bytes: float
    code_bytes: int
    """Size of the compiled program."""
    seconds: float
    """Time to compile on this machine."""
    trace_seconds: float
    """Time of a CPU to trace it, which Python does for one program after another."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory.limit

    def layer_collectives(self, kind: LayerKind) -> list[Collective]:
        """The collectives of one layer of this kind."""
        return [item for item in self.collectives if item.in_layer_loop and item.runs(kind)]


@dataclass(frozen=True)
class RefusedProgram:
    """A program that does not compile."""

    spec: ProgramSpec
    reason: str
    """The compiler's reason, in one line."""
    needed: int | None
    """Bytes of HBM that the program needs, if the compiler says so."""
    out_of_memory: bool
    seconds: float

    @property
    def fits(self) -> bool:
        return False


Program = CompiledProgram | RefusedProgram


def program_specs(
    config: RunConfig, kind: ModelKind, mesh: Mesh, rows: Mapping[Bucket, int], images: Mapping[ImageSize, int]
) -> Iterator[ProgramSpec]:
    """The programs of a run on the slice's mesh.

    Args:
        config: the run.
        kind: its model.
        mesh: devices of the slice.
        rows: buckets of the decoder, with the rows of a work group's block.
        images: buckets of the vision tower, with the images that a work group encodes together.
    """
    model = abstract_model(kind, dtype_on(mesh, config.compute), mesh, config.compute.ffn_path)
    weights = bytes_on_device(nnx.state(model))
    programs = Programs(
        model, mesh, config.reduction, seed=config.seed, new_tokens=config.search.max_new_tokens, stop_tokens=(0,)
    )
    for size, count in images.items():
        abstract = abstract_images(kind.image_arrays(size), count * programs.groups, mesh)
        yield ProgramSpec(
            "encode",
            image_bucket(size),
            partial(programs.encode_program.lower, abstract),
            kind.config.vision.depth,
            count * programs.groups,
            count * math.prod(size),
            weights + bytes_on_device(abstract),
        )
    for bucket, count in rows.items():
        yield from _decoder_specs(config, programs, bucket, count, weights)


def row_bucket(bucket: Bucket) -> str:
    """A bucket of the decoder in words."""
    return f"text {bucket.text}, visual {bucket.visual}"


def image_bucket(size: ImageSize) -> str:
    """A bucket of the vision tower in words."""
    return f"patches {' x '.join(map(str, size))}"


def _decoder_specs(config: RunConfig, programs: Programs, bucket: Bucket, rows: int, weights: int) -> Iterator[ProgramSpec]:
    layers, in_all = programs.config.num_layers, rows * programs.groups
    arguments = decoder_arguments(programs, bucket, in_all)
    generates = config.search.objective == "generation"
    kernels = _kernel_flops(config, programs, bucket, rows)
    for program, inputs in arguments.items():
        name = program.name
        if (name == "generate") != generates:
            continue
        yield ProgramSpec(
            name,
            row_bucket(bucket),
            partial(program.lower, *inputs),
            layers if name in ("layers", "generate") else 0,
            in_all,
            rows * bucket.slots,
            weights + bytes_on_device(inputs),
            steps=programs.new_tokens if name == "generate" else 1,
            kernel_flops=kernels if name in ("layers", "generate") else (0, 0),
            keeps_states=True,
        )


def _kernel_flops(config: RunConfig, programs: Programs, bucket: Bucket, rows: int) -> tuple[int, int]:
    """FLOPs per layer and device of the attention kernels, dense and hollow, for a block of `rows` rows."""
    if programs.kernel != "splash":
        return 0, 0
    heads = programs.config.num_heads // config.compute.model_shards * rows
    dense, hollow = (
        kernel_flops(bucket, reach, heads, programs.config.head_dim) for reach in (None, config.reduction.attention_range)
    )
    return dense, hollow


def compile_program(spec: ProgramSpec, mesh_shape: tuple[int, int], resident_bytes: int, memory_limit: int) -> Program:
    """Compile one program for a mesh (work, model) and analyse it.

    A device has `memory_limit` bytes of HBM, of which batches and base states take `resident_bytes`.
    """
    began = time.thread_time()
    lowered = spec.lower()
    trace_seconds = time.thread_time() - began
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(spec, str(error), time.monotonic() - began)
    seconds = time.monotonic() - began
    text: Any = compiled.as_text()
    module = parse_module(text)
    loops = Loops(module, spec.layers, spec.steps)
    sizes: Any = compiled.memory_analysis()
    xla: Any = compiled.cost_analysis()
    idle = max(0, spec.held_bytes - sizes.argument_size_in_bytes)
    return CompiledProgram(
        spec=spec,
        memory=Memory(
            sizes.argument_size_in_bytes,
            sizes.temp_size_in_bytes,
            sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            idle + (resident_bytes if spec.keeps_states else 0),
            memory_limit,
        ),
        costs={
            kind: with_kernels(program_cost(module, loops, kind), spec.layers, spec.kernel_flops[kind in ("attention", "both")])
            for kind in LAYER_KINDS
        },
        collectives=tuple(find_collectives(module, loops, mesh_shape)),
        xla_flops=xla["flops"],
        xla_bytes=xla["bytes accessed"],
        code_bytes=sizes.generated_code_size_in_bytes,
        seconds=seconds,
        trace_seconds=trace_seconds,
    )


def with_kernels(cost: ProgramCost, layers: int, flops: int) -> ProgramCost:
    """Add `flops` per layer: the arithmetic of kernels that the compiled text does not declare."""
    layer = None if cost.layer is None else cost.layer + Cost(flops, 0)
    return ProgramCost(cost.total + Cost(flops * layers, 0), layer)


def refusal(spec: ProgramSpec, message: str, seconds: float) -> RefusedProgram:
    """Summarise the compiler's error message."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = lines[0] if lines else "the compiler names no reason"
    return RefusedProgram(spec, reason, bytes_refused(message), is_out_of_memory(message), seconds)
