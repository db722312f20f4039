"""The dry run's analysis of a decoder-like program that XLA compiled for eight simulated devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlens_jax.dry_run.program import CompiledProgram, ProgramSpec, compile_program

B, T, D, F, M, U = 4, 6, 16, 64, 2, 8
WORK, MODEL = 2, 4
ROWS, UNITS, KEPT = B // WORK, F // MODEL, U // MODEL
"""Of one device."""
DENSE = 2 * ROWS * T * D * UNITS * 2
REDUCED = 2 * ROWS * M * D * UNITS + 2 * ROWS * T * D * KEPT * 2
STATES, SCORES = ROWS * T * D * 4, ROWS * UNITS * 4 * 4
PROGRAMS = ["scanned 5", "scanned 9", "bounded 5", "bounded 9"]


def layer(x, weights, flag):
    """All-reduce always; then a full FFN, or scores gathered and a part of the units."""
    up, down = weights

    def full(x):
        return jax.lax.psum(jnp.einsum("BTF,FD->BTD", jnp.einsum("BTD,FD->BTF", x, up), down), "model")

    def part(x):
        scores = jnp.einsum("BMD,FD->BMF", x[:, :M], up).sum(axis=1)
        gathered = jax.lax.all_gather(scores, "model", axis=1, tiled=True)
        hidden = jnp.einsum("BTD,UD->BTU", x, up[: U // MODEL]) * gathered.max()
        return jax.lax.psum(jnp.einsum("BTU,UD->BTD", hidden, down[: U // MODEL]), "model")

    return jax.lax.cond(flag, part, full, x)


def scanned(weights, x, flags):
    return jax.lax.scan(lambda x, inputs: (layer(x, inputs[:2], inputs[2]), None), x, (*weights, flags))[0]


def bounded(weights, x, flags, start, stop):
    def body(i, x):
        return layer(x, [jax.lax.dynamic_index_in_dim(w, i, keepdims=False) for w in weights], flags[i])

    return jax.lax.fori_loop(start, stop, body, x)


def spec(mesh, function, layers, *bounds):
    rows, whole, cut = PartitionSpec("work"), PartitionSpec(), PartitionSpec(None, "model")
    split = jax.shard_map(
        function, mesh=mesh, in_specs=((cut, cut), rows, *([whole] * (1 + len(bounds)))), out_specs=rows, check_vma=False
    )

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))

    matrix = abstract((layers, F, D), jnp.float32, cut)
    arguments = (
        (matrix, matrix),
        abstract((B, T, D), jnp.float32, rows),
        abstract((layers,), jnp.bool_, whole),
        *(abstract((), jnp.int32, whole) for _ in bounds),
    )
    return ProgramSpec(function.__name__, "tiny", lambda: jax.jit(split).lower(*arguments), layers, B, ROWS * T, 0)


def facts(program):
    assert isinstance(program, CompiledProgram), program
    return {
        "dense": [program.costs["dense"].layer.flops, program.costs["dense"].total.flops],
        "reduced": [program.costs["both"].layer.flops, program.costs["both"].total.flops],
        "bytes": [program.costs["dense"].total.bytes, program.costs["dense"].layer.bytes],
        "xla": [program.xla_flops, program.xla_bytes],
        "arguments": program.memory.arguments,
        "layer": {
            label: [[item.kind, item.axis, item.group_size, item.bytes, item.times] for item in program.layer_collectives(kind)]
            for label, kind in (("dense", "dense"), ("reduced", "both"))
        },
        "outside": sum(not item.in_layer_loop for item in program.collectives),
        "code_bytes": program.code_bytes,
    }


@pytest.fixture(scope="module")
def analyses() -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()).reshape(WORK, MODEL), ("work", "model"))
    programs = {}
    for layers in (5, 9):
        for function, bounds in ((scanned, ()), (bounded, ("start", "stop"))):
            program = compile_program(
                spec(mesh, function, layers, *bounds), (WORK, MODEL), resident_bytes=0, memory_limit=1 << 30
            )
            programs[f"{function.__name__} {layers}"] = facts(program)
    return programs


@pytest.mark.parametrize("program", PROGRAMS)
def test_flops_with_trip_counts(analyses: dict[str, Any], program: str) -> None:
    layers = int(program.split()[1])
    assert analyses[program]["dense"] == [DENSE, layers * DENSE]
    assert analyses[program]["reduced"] == [REDUCED, layers * REDUCED]


@pytest.mark.parametrize("program", PROGRAMS)
def test_xla_itself_counts_the_body_once_and_the_larger_branch(analyses: dict[str, Any], program: str) -> None:
    # Elementwise work is in XLA's count and not in ours.
    assert DENSE <= analyses[program]["xla"][0] < 1.5 * DENSE


@pytest.mark.parametrize("program", PROGRAMS)
def test_collectives_of_a_layer(analyses: dict[str, Any], program: str) -> None:
    layers = int(program.split()[1])
    reduce = ["all-reduce", "model", 4, STATES, layers]
    gather = ["all-gather", "model", 4, SCORES, layers]
    assert analyses[program]["layer"]["dense"] == [reduce]
    assert sorted(analyses[program]["layer"]["reduced"]) == [gather, reduce]
    assert analyses[program]["outside"] == 0


def test_traffic_of_a_layer_does_not_grow_with_the_stack(analyses: dict[str, Any]) -> None:
    few, many = (analyses[f"bounded {layers}"]["bytes"][1] for layers in (5, 9))
    assert few == many
    weights = 2 * UNITS * D * 4
    assert weights < few < 8 * weights


def test_arguments_are_a_devices_share(analyses: dict[str, Any]) -> None:
    assert analyses["scanned 5"]["arguments"] == 5 * 2 * UNITS * D * 4 + STATES + 5
