"""Weight bytes that a reduced layer reads from HBM, against a dense one, off XLA's schedule for a TPU slice that need not exist.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/weight_traffic.py      (libtpu must be installed; some minutes)

One decoder layer of Qwen2-VL-7B, 384 text and 1664 visual tokens, bfloat16, out of a stack of 28 (which layer is data, as in
a layer loop): the projections of the attention (its products of tokens with tokens have no weights) and the FFN: dense, reduced
with XLA's gather, and reduced with the kernel of ops/row_gather.py, for which weights are kept as [F, 2, D / 2]. The dense layer
that all are compared with keeps them as [F, D].

Counted: whatever an instruction of the scheduled program reads out of HBM that is a weight, or made of weights only (a copy, a
gathered matrix), and what it writes of the latter to HBM; a prefetch into VMEM is a read, reads out of VMEM are not. Of the
kernel, which the schedule does not look into: whole tiles of rows for an even share of the kept units. Not counted: tiles for
units over the capacity (none, for an even share).
"""

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.ffn import FfnWeights, RowStore, dense_ffn, dynamic_ffn
from rlens_jax.ops.row_gather import TILE
from rlens_jax.plan import Reduction

TEXT, VISUAL, LAYERS = 384, 1664, 28
D, F, QUERY, KV = 3584, 18944, 3584, 1024  # of Qwen2-VL-7B; k and v together are 1024 wide
KINDS = {
    "dense": (D,),
    "dense, halves": (2, D // 2),
    "reduced, XLA's gather": (D,),
    "reduced, kernel": (2, D // 2),
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
            read = {}
            for kind in KINDS:
                compiled = compile_layer(mesh, batch, kind)
                read[kind] = weight_bytes(compiled.as_text(), kernel_bytes(batch, model), options.verbose)
            for kind, size in read.items():
                ratio = size / read["dense"]
                print(f"batch {batch}  {kind:22} {size / 1e6:9.1f} MB   / dense {ratio:.3f}", flush=True)


def compile_layer(mesh: Mesh, batch: int, kind: str) -> jax.stages.Compiled:
    """One layer for the slice; `batch` samples a work group."""

    def local(x: jax.Array, layout: TokenLayout, stack: dict, layer: jax.Array) -> jax.Array:
        at = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        qkv = x @ at(stack["qkv"])
        width = QUERY // mesh.shape["model"]
        attended = qkv[:, :, :width] + qkv[:, :, -width:]  # all of it is used
        x = x + jax.lax.psum(attended @ at(stack["o"]), "model")
        weights = jax.tree.map(at, stack["ffn"])
        if kind.startswith("dense"):
            return x + jax.lax.psum(dense_ffn(x, weights), "model")
        store = RowStore(stack["ffn"], layer) if kind == "reduced, kernel" else None
        y, _ = dynamic_ffn(x, weights, layout, REDUCTION, jax.random.key(0), store=store)
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
    ffn = FfnWeights(*[array((LAYERS, F, *KINDS[kind]), jnp.bfloat16, None, "model")] * 3)
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


ITEM = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
TYPE = r"(?:\w+\[[\d,]*\](?:\{[^}]*\})?)"
LINE = re.compile(
    rf"^\s*(?:ROOT )?%([\w.\-]+) = (\((?:[^{{}}]|\{{[^}}]*\}})*?\)|{TYPE}) ([a-z][\w\-]*)\(([^)]*)\)(.*)$"
)
SMALL = 1 << 20
"""Bytes under which an array is no weight here."""


@dataclass(frozen=True)
class Instruction:
    """A line of HLO text."""

    name: str
    types: list[str]
    opcode: str
    operands: list[str]
    rest: str

    def size(self) -> int:
        """Bytes of the result; of an asynchronous operation those of what it brings."""
        return bytes_of(self.types[0])

    def in_hbm(self) -> bool:
        return "S(1)" not in self.types[0]


def bytes_of(text: str) -> int:
    kind, dims = re.match(r"(\w+)\[([\d,]*)\]", text).groups()  # type: ignore[union-attr]
    return ITEM.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)


def computations(text: str) -> dict[str, list[Instruction]]:
    """Name -> its instructions in scheduled order; the program itself is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            body = found["ENTRY" if head[1] else head[2]] = []
        elif match := LINE.match(re.sub(r"/\*.*?\*/", "", line)):
            name, types, opcode, operands, rest = match.groups()
            body.append(
                Instruction(
                    name, re.findall(TYPE, types), opcode, re.findall(r"%?([\w.\-]+)", operands), rest
                )
            )
    return found


def weight_bytes(text: str, kernel: int, verbose: bool = False) -> int:
    """Bytes of weights, and of arrays made of weights alone, that the scheduled program moves from and to HBM."""
    program = computations(text)
    entry = {instruction.name: instruction for instruction in program["ENTRY"]}
    weights: set[str] = set()
    total = 0
    for instruction in entry.values():
        if instruction.opcode == "parameter":
            if instruction.size() > SMALL and instruction.types[0].startswith(f"bf16[{LAYERS},"):
                weights.add(instruction.name)
            continue
        heavy = [name for name in instruction.operands if name in weights]
        if not heavy:
            continue
        others = [
            name
            for name in instruction.operands
            if name not in weights and entry[name].types[0].startswith(("bf16", "f32"))
        ]
        made_of_weights = not others and instruction.opcode not in ("custom-call", "while")
        if made_of_weights:
            weights.add(instruction.name)
        if instruction.opcode in (
            "bitcast",
            "tuple",
            "get-tuple-element",
            "while",
        ) or instruction.opcode.endswith("-done"):
            continue
        moved = (
            kernel if instruction.opcode == "custom-call" else sum(reads(instruction, program, entry, heavy))
        )
        if (
            made_of_weights
            and instruction.in_hbm()
            and instruction.opcode not in ("copy-start", "async-start")
        ):
            moved += instruction.size()
        total += moved
        if verbose:
            print(
                f"   {instruction.opcode:14} {instruction.name:30} {moved / 1e6:8.1f} MB {instruction.types[0][:60]}"
            )
    return total


def reads(
    instruction: Instruction,
    program: dict[str, list[Instruction]],
    entry: dict[str, Instruction],
    heavy: list[str],
) -> Iterator[int]:
    """Bytes of each weight in HBM that the instruction reads: of a fusion that slices it first, those of the slice."""
    for number, name in enumerate(instruction.operands):
        if name not in heavy or not entry[name].in_hbm():
            continue
        called = re.search(r"calls=%([\w.\-]+)", instruction.rest)
        if instruction.opcode in (
            "copy-start",
            "slice-start",
            "async-start",
            "dynamic-slice",
            "slice",
            "copy",
        ):
            yield instruction.size()
        elif called:
            yield read_inside(program[called[1]], number, program) or bytes_of(entry[name].types[0])
        else:
            yield bytes_of(entry[name].types[0])


def read_inside(body: list[Instruction], number: int, program: dict[str, list[Instruction]]) -> int:
    """Bytes of the slices that a fusion takes of its parameter; 0 if it takes the whole."""
    names = {i.name for i in body if i.opcode == "parameter" and i.operands == [str(number)]}
    total = 0
    for instruction in body:
        if names.isdisjoint(instruction.operands):
            continue
        if instruction.opcode == "bitcast":
            names.add(instruction.name)
        elif instruction.opcode in ("dynamic-slice", "slice"):
            total += instruction.size()
        elif instruction.opcode == "fusion":
            called = re.search(r"calls=%([\w.\-]+)", instruction.rest)
            inner = [
                read_inside(program[called[1]], k, program)
                for k, o in enumerate(instruction.operands)
                if o in names
            ]  # type: ignore[index]
            if not all(inner):
                return 0
            total += sum(inner)
        else:
            return 0
    return total


if __name__ == "__main__":
    main()
