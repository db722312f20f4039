"""Made-up compiled programs."""

from collections.abc import Sequence
from typing import Any

from rlens_jax.dry_run.costs import LAYER_KINDS, Collective, Cost, ProgramCost
from rlens_jax.dry_run.program import CompiledProgram, Memory, ProgramSpec

GIB = 2**30


def spec(name: str, bucket: str = "text 32, visual 64", layers: int = 0, slots: int = 96) -> ProgramSpec:
    def lower() -> Any:
        raise AssertionError("is not to be compiled")

    return ProgramSpec(name, bucket, lower, layers, 8, slots, 0, keeps_states=name != "encode")


def compiled(
    name: str,
    bucket: str = "text 32, visual 64",
    *,
    layers: int = 0,
    slots: int = 96,
    dense: ProgramCost | None = None,
    reduced: ProgramCost | None = None,
    collectives: Sequence[Collective] = (),
    memory: Memory | None = None,
) -> CompiledProgram:
    cost = dense or ProgramCost(Cost(1e12, 2e9), Cost(1e11, 2e8) if layers else None)
    return CompiledProgram(
        spec=spec(name, bucket, layers, slots),
        memory=memory or Memory(4 * GIB, GIB, GIB // 2, 2 * GIB, round(15.75 * GIB)),
        costs={kind: cost if kind == "dense" else reduced or cost for kind in LAYER_KINDS},
        collectives=tuple(collectives),
        xla_flops=1e11,
        xla_bytes=2e8,
        code_bytes=1 << 20,
        seconds=12.5,
        trace_seconds=1.5,
    )
