"""A decoder-like program compiled for 8 simulated CPU devices, read by the dry run; prints what it found as JSON.

Run by test_compiled.py in a process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlens_jax.dry_run.program import CompiledProgram, ProgramSpec, compile_program

B, T, D, F, M, U = 4, 6, 16, 64, 2, 8
WORK, MODEL = 2, 4


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
    return jax.lax.scan(lambda x, given: (layer(x, given[:2], given[2]), None), x, (*weights, flags))[0]


def bounded(weights, x, flags, start, stop):
    def body(i, x):
        return layer(x, [jax.lax.dynamic_index_in_dim(w, i, keepdims=False) for w in weights], flags[i])

    return jax.lax.fori_loop(start, stop, body, x)


def spec(mesh, function, layers, *bounds):
    rows, whole, cut = PartitionSpec("work"), PartitionSpec(), PartitionSpec(None, "model")
    split = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=((cut, cut), rows, *([whole] * (1 + len(bounds)))),
        out_specs=rows,
        check_vma=False,
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
    return ProgramSpec(function.__name__, "tiny", lambda: jax.jit(split).lower(*arguments), layers, B, 0)


def facts(program):
    assert isinstance(program, CompiledProgram), program
    return {
        "dense": [program.dense.layer.flops, program.dense.total.flops],
        "reduced": [program.reduced.layer.flops, program.reduced.total.flops],
        "bytes": [program.dense.total.bytes, program.dense.layer.bytes],
        "xla": [program.xla_flops, program.xla_bytes],
        "arguments": program.memory.arguments,
        "layer": {
            label: [
                [item.kind, item.axis, item.group_size, item.bytes, item.times]
                for item in program.layer_collectives(dense=dense)
            ]
            for label, dense in (("dense", True), ("reduced", False))
        },
        "outside": sum(not item.in_layer_loop for item in program.collectives),
        "code_bytes": program.code_bytes,
    }


def main():
    mesh = Mesh(np.array(jax.devices()).reshape(WORK, MODEL), ("work", "model"))
    found = {}
    for layers in (5, 9):
        for function, bounds in ((scanned, ()), (bounded, ("start", "stop"))):
            program = compile_program(
                spec(mesh, function, layers, *bounds), (WORK, MODEL), resident_bytes=0, memory_limit=1 << 30
            )
            found[f"{function.__name__} {layers}"] = facts(program)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
