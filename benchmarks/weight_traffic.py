"""Measure the weight bytes that dense and reduced layers move from and to HBM, in XLA's schedule for a TPU slice.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/weight_traffic.py      (needs libtpu; takes some minutes)

The slice need not exist: the search's program of Qwen2-VL-7B's layers is compiled as for a run, in bfloat16, with 384 text and
1664 visual tokens per sample and FFN units in the TPU's form (ops/ffn_tpu.py); with --rows also with units as [F, D] and XLA's
own gather.

Counted are the reads from HBM of weights, and of arrays made of weights only (a copy, a gathered matrix), by the instructions of
the loop over layers, and the writes of such arrays to HBM. A prefetch into VMEM counts as a read; reads from VMEM do not count.
Work on weights before the loop is divided among the layers. The schedule says nothing about the kernel, which counts as whole
tiles of rows for an even share of the kept units. Tiles for units over the capacity are not counted (an even share has none).

Expect a dense layer to read each weight once, and a reduced layer to move 1.2 times its weights for one sample per work group.
"""

import argparse
import math
from dataclasses import dataclass, field

from layer_program import LAYERS, layer_program, model_kind

from rlens_jax.config import FfnPath
from rlens_jax.dry_run.costs import bytes_read
from rlens_jax.dry_run.hlo import Computation, Instruction, Loops, Module, Shape, parse_module
from rlens_jax.ops.ffn_tpu import TILE
from rlens_jax.plans import Reduction

DECODER = model_kind().config.decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="the TPU slice")
    parser.add_argument("--model", type=int, nargs="+", default=[4, 2, 1], help="sizes of the model axis")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="samples per work group")
    parser.add_argument("--rows", action="store_true", help="also compile with units as [F, D]")
    parser.add_argument("--verbose", action="store_true", help="name every instruction that is counted")
    options = parser.parse_args()
    for model in options.model:
        weights = weight_size() / model
        print(f"\n{options.topology}, model = {model}: {weights / 1e6:.1f} MB of weights per layer and chip")
        for batch in options.batch:
            report(options.topology, model, batch, "auto", weights, options.verbose)
            if options.rows:
                report(options.topology, model, batch, "gathered", weights, options.verbose)


def weight_size() -> int:
    """Bytes of one layer's matrices on all chips."""
    sizes = DECODER.sizes
    heads = (2 * sizes["N"] + 2 * sizes["K"]) * sizes["H"]
    return 2 * sizes["D"] * (heads + 3 * sizes["F"])


def report(topology: str, model: int, batch: int, ffn_path: FfnPath, weights: float, verbose: bool) -> None:
    """Compile the program and print the bytes that its dense and reduced layers move."""
    spec, _ = layer_program(topology, model, batch, ffn_path=ffn_path)
    text = spec.lower().compile().as_text()
    module = parse_module(text)
    kernel = "fetched_ffn" in text
    moved = {}
    for name, branch in (("dense", 0), ("reduced", -1)):
        if verbose:
            print(f"  {name}")
        moved[name] = Walk(module, branch, verbose).bytes_per_layer()
    if kernel:
        units = math.ceil(Reduction().kept_units(DECODER.sizes["F"]) / model / TILE) * TILE
        moved["reduced"] += batch * units * 3 * DECODER.sizes["D"] * 2
    for name, size in moved.items():
        print(
            f"batch {batch}  {name:8} {'kernel' if kernel else '[F, D]'} {size / 1e6:9.1f} MB   "
            f"/ weights {size / weights:.3f}   / dense {size / moved['dense']:.3f}",
            flush=True,
        )


NAMES = ("bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "dynamic-slice-done", "async-done", "custom-call")
"""Opcodes that move nothing, and the kernel, which is counted separately."""


@dataclass
class Walk:
    """Follows the weights through a program."""

    module: Module
    branch: int
    """The branch of every conditional that counts."""
    verbose: bool
    in_layer: bool = False
    loops: Loops = field(init=False)

    def __post_init__(self) -> None:
        self.loops = Loops(self.module, layers=LAYERS)

    def bytes_per_layer(self) -> float:
        """Bytes per layer: those of the loop's body, and a layer's share of the work on weights before the loop."""
        stacks = {
            item.name
            for item in self.module.entry
            if item.opcode == "parameter" and item.shapes[0].dtype == "bf16" and item.shapes[0].dims[:1] == (LAYERS,)
        }
        return self.moved(self.module.entry, stacks) / LAYERS

    def moved(self, computation: Computation, weights: set[str]) -> float:
        """Bytes per run of a computation, with all iterations of its loops; `weights` names the arrays that are weights."""
        total = 0.0
        for item in computation:
            if item.opcode == "while":
                body = self.module.computations[item.called["body"]]
                is_layer = self.loops.is_layer_loop(item, self.in_layer)
                # A loop of unknown count inside a layer runs for units over the capacity: none here.
                known = is_layer or self.loops.known[item.name] is not None
                times = self.loops.trips(item, self.in_layer) if known else 0
                self.in_layer |= is_layer
                total += times * self.below(body, item.operands[0], computation, weights)
                self.in_layer &= not is_layer
            elif item.opcode == "conditional":
                number = range(len(item.branches))[self.branch]
                body = self.module.computations[item.branches[number]]
                total += self.below(body, item.operands[1 + number], computation, weights)
            elif not weights.isdisjoint(item.operands):
                total += self.one(item, computation, weights)
        return total

    def below(self, body: Computation, argument: str, computation: Computation, weights: set[str]) -> float:
        """Bytes of a computation that is called with a tuple."""
        arrays = computation.instructions[argument].operands
        inside = {
            item.name
            for item in body
            if item.opcode == "get-tuple-element"
            and item.operands[0] == body.parameters[0].name
            and arrays[int(item.attribute("index") or 0)] in weights
        }
        return self.moved(body, inside)

    def one(self, item: Instruction, computation: Computation, weights: set[str]) -> float:
        """Bytes of an instruction that reads weights. Its result joins `weights` if it is made of weights only."""
        others = [computation.instructions[name] for name in item.operands if name not in weights]
        numbers = [s for other in others for s in other.shapes if s.dtype in ("bf16", "f32") and s.dims]
        if item.opcode != "custom-call" and not numbers:
            weights.add(item.name)
        moved = sum(self.read(item, number, computation) for number, name in enumerate(item.operands) if name in weights)
        if item.name in weights and item.opcode not in NAMES:
            moved += sum(shape.bytes for shape in results(item, computation) if shape.in_hbm)
        if self.verbose and moved > 1e5:
            print(f"   {item.opcode:14} {item.name:36} {moved / 1e6:8.1f} MB -> {item.shapes[0]}")
        return moved

    def read(self, item: Instruction, number: int, computation: Computation) -> float:
        """Bytes of one operand that an instruction reads from HBM."""
        shape = computation.instructions[item.operands[number]].shapes[0]
        if item.opcode in NAMES or not shape.in_hbm:
            return 0
        if item.opcode == "fusion":
            inner = self.module.computations[item.called["calls"]]
            return bytes_read(inner.parameters[number], inner, self.module.computations)
        if "slice" in item.opcode:
            return results(item, computation)[0].bytes
        return shape.bytes


def results(item: Instruction, computation: Computation) -> list[Shape]:
    """The arrays that an instruction makes. An asynchronous one lists its operands before them."""
    if item.opcode == "copy-start":
        return [item.shapes[0]]
    operands = len(computation.operand_shapes(item)) if item.opcode.endswith("-start") else 0
    return [shape for shape in item.shapes[operands:] if shape.dtype in ("bf16", "f32")]


if __name__ == "__main__":
    main()
