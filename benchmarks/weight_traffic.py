"""Weight bytes that a reduced layer reads from HBM, against a dense one, off XLA's schedule for a TPU slice that need not exist.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/weight_traffic.py      (libtpu must be installed; some minutes)

One decoder layer of Qwen2-VL-7B, 384 text and 1664 visual tokens, bfloat16, out of a stack of 28 (which layer is data, as in
a layer loop): the projections of the attention (its products of tokens with tokens have no weights) and the FFN, dense and
reduced, as the decoder runs them on a TPU (ops/stored_units.py); beside them, what XLA makes of weights kept as [F, D].

Counted: whatever an instruction of the scheduled program reads out of HBM that is a weight, or made of weights only (a copy, a
gathered matrix), and what it writes of the latter to HBM; a prefetch into VMEM is a read, reads out of VMEM are not. Of the
kernel, which the schedule does not look into: whole tiles of rows for an even share of the kept units. Not counted: tiles for
units over the capacity (none, for an even share).
"""

import argparse
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlens_jax.dry_run.costs import taken
from rlens_jax.dry_run.hlo import Computation, Instruction, Module, Shape, parse_module
from rlens_jax.dry_run.loops import known_trips
from rlens_jax.layout import TokenLayout
from rlens_jax.ops.ffn import FfnWeights, dense_ffn, dynamic_ffn
from rlens_jax.ops.row_gather import TILE
from rlens_jax.ops.stored_units import StoredUnits, UnitStack
from rlens_jax.plan import Reduction

TEXT, VISUAL, LAYERS = 384, 1664, 28
D, F, QUERY, KV = 3584, 18944, 3584, 1024  # of Qwen2-VL-7B; k and v together are 1024 wide
KINDS = {
    "dense, [F, D]": (D,),
    "dense": (2, D // 2),
    "reduced, XLA's gather": (D,),
    "reduced": (2, D // 2),
}
"""Name -> form of a unit's row."""
REDUCTION = Reduction()
UNITS = REDUCTION.kept_units(F)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--model", type=int, nargs="+", default=[4, 1], help="sizes of the model axis")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--verbose", action="store_true", help="name every instruction that is counted")
    options = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices)
    for model in options.model:
        mesh = Mesh(devices.reshape(-1, model), ("work", "model"))
        weights = (D * (QUERY + KV) + QUERY * D + 3 * D * F) * 2 // model
        print(f"\n{options.topology}, model = {model}: {weights / 1e6:.1f} MB of weights a layer and chip")
        for batch in options.batch:
            for kind in KINDS:
                size = weight_bytes(compile_layer(mesh, batch, kind).as_text(), options.verbose)
                if kind == "reduced":
                    size += kernel_bytes(batch, model)
                print(
                    f"batch {batch}  {kind:22} {size / 1e6:9.1f} MB   / weights {size / weights:.3f}",
                    flush=True,
                )


def compile_layer(mesh: Mesh, batch: int, kind: str) -> jax.stages.Compiled:
    """One layer for the slice; `batch` samples a work group."""

    def local(x: jax.Array, layout: TokenLayout, stack: dict, layer: jax.Array) -> jax.Array:
        at = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        qkv = x @ at(stack["qkv"])
        width = QUERY // mesh.shape["model"]
        attended = qkv[:, :, :width] + qkv[:, :, -width:]  # all of it is used
        x = x + jax.lax.psum(attended @ at(stack["o"]), "model")
        stored = len(KINDS[kind]) == 2
        units = StoredUnits(UnitStack(*stack["ffn"]), layer) if stored else FfnWeights(*map(at, stack["ffn"]))
        if kind.startswith("dense"):
            return x + jax.lax.psum(dense_ffn(x, units), "model")
        y, _ = dynamic_ffn(x, units, layout, REDUCTION, jax.random.key(0))
        return x + jax.lax.psum(y, "model")

    def array(shape: tuple[int, ...], dtype: type, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, Spec(*spec)))

    all_samples = batch * mesh.shape["work"]
    rows = partial(array, (all_samples,), jnp.int32, "work")
    layout = TokenLayout(
        array((all_samples, TEXT), jnp.int32, "work"),
        array((all_samples, VISUAL), jnp.int32, "work"),
        rows(),
        rows(),
        rows(),
    )
    ffn = [array((LAYERS, F, *KINDS[kind]), jnp.bfloat16, None, "model")] * 3
    stack = {
        "qkv": array((LAYERS, D, QUERY + KV), jnp.bfloat16, None, None, "model"),
        "o": array((LAYERS, QUERY, D), jnp.bfloat16, None, "model"),
        "ffn": ffn,
    }
    arguments = (
        array((all_samples, TEXT + VISUAL, D), jnp.bfloat16, "work"),
        layout,
        stack,
        array((), jnp.int32),
    )
    specs = jax.tree.map(lambda a: a.sharding.spec, arguments)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=Spec("work"), check_vma=False)
    return jax.jit(sharded).lower(*arguments).compile()


def kernel_bytes(batch: int, model: int) -> int:
    """What the kernel fetches when each shard owns its even share of the kept units."""
    return batch * math.ceil(UNITS / model / TILE) * TILE * 3 * D * 2


def weight_bytes(text: str, verbose: bool = False) -> float:
    """Bytes of weights, and of arrays made of weights alone, that the program moves from and to HBM, but for the kernel."""
    module = parse_module(text)
    stacks = {
        item.name
        for item in module.entry
        if item.opcode == "parameter" and item.shapes[0].dtype == "bf16" and item.shapes[0].dims[0] == LAYERS
    }
    return moved(module, known_trips(module), module.entry, stacks, verbose)


def moved(
    module: Module, trips: dict[str, int | None], computation: Computation, weights: set[str], verbose: bool
) -> float:
    """Of one run of a computation, in which the arrays called `weights` are such; its loops multiplied in."""
    total = 0.0
    for item in computation:
        if item.opcode == "while":
            # The loop of unknown count takes the units over the capacity: none here.
            if times := trips[item.name]:
                body = module.computations[item.called["body"]]
                given = computation.instructions[item.operands[0]].operands
                inside = {
                    part.name
                    for part in body
                    if part.opcode == "get-tuple-element"
                    and given[int(part.attribute("index") or 0)] in weights
                }
                total += times * moved(module, trips, body, inside, verbose)
            continue
        if weights.isdisjoint(item.operands):
            continue
        others = [computation.instructions[name].shapes[0] for name in item.operands if name not in weights]
        if item.opcode != "custom-call" and not any(s.dtype in ("bf16", "f32") and s.dims for s in others):
            weights.add(item.name)
        bytes_moved = sum(
            read(item, number, computation, module)
            for number, name in enumerate(item.operands)
            if name in weights
        )
        if item.name in weights and item.opcode not in NAMES:
            bytes_moved += sum(shape.bytes for shape in results(item, computation) if shape.in_hbm)
        total += bytes_moved
        if verbose and bytes_moved:
            print(f"   {item.opcode:14} {item.name:30} {bytes_moved / 1e6:8.1f} MB -> {item.shapes[0]}")
    return total


NAMES = ("bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "async-done", "custom-call")
"""What moves nothing by itself; and the kernel, which is counted apart."""


def read(item: Instruction, number: int, computation: Computation, module: Module) -> float:
    """Bytes that an instruction reads of one operand out of HBM."""
    shape = computation.instructions[item.operands[number]].shapes[0]
    if item.opcode in NAMES or not shape.in_hbm:
        return 0
    if item.opcode == "fusion":
        inner = module.computations[item.called["calls"]]
        return taken(inner.parameters[number], inner, module.computations)
    if "slice" in item.opcode:
        return results(item, computation)[0].bytes
    return shape.bytes


def results(item: Instruction, computation: Computation) -> list[Shape]:
    """The arrays that an instruction makes; an asynchronous one names its operands beside them."""
    if item.opcode == "copy-start":
        return [item.shapes[0]]
    given = len(computation.operand_shapes(item)) if item.opcode.endswith("-start") else 0
    return [shape for shape in item.shapes[given:] if shape.dtype in ("bf16", "f32")]


if __name__ == "__main__":
    main()
