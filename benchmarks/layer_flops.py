"""Compare the FLOPs of a layer compiled for a TPU slice with the formula with probes.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/layer_flops.py      (needs libtpu; takes some minutes)

The slice need not exist. Qwen2-VL-7B, 384 text and 1664 visual tokens, one sample per work group: a whole layer, dense and
reduced, and its FFN alone (ops/ffn_tpu.py). Counted are all matrix products with the iterations of their loops, the blocks that
the attention kernel visits, and the declared cost of the FFN kernel: whole tiles for an even share of the kept units. The
benchmark also draws how many tiles the busiest shard has if the kept units are spread at random.

Expect ratios near 1; a reduced layer also computes the rest of its last tile.
"""

import argparse
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from layer_program import LAYERS, TEXT, VISUAL, layer_program, model_kind

from rlens_jax.dry_run.costs import program_cost
from rlens_jax.dry_run.hlo import Loops, parse_module
from rlens_jax.dry_run.program import CompiledProgram, compile_program
from rlens_jax.errors import UserError
from rlens_jax.flops import layer_cost
from rlens_jax.layout import TokenLayout
from rlens_jax.ops.ffn import dynamic_ffn, shard_capacity
from rlens_jax.ops.ffn_tpu import HEADROOM, TILE, HalvedStack, HalvedUnits
from rlens_jax.plans import FULL, STANDARD, Reduction
from rlens_jax.sharding.mesh import check_fits

D, F = 3584, 18944
REDUCTION = Reduction()
UNITS, PROBES = REDUCTION.kept_units(F), REDUCTION.probe_count(VISUAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="the TPU slice")
    parser.add_argument("--model", type=int, nargs="+", default=[1, 4, 8], help="sizes of the model axis")
    options = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices)
    for model in options.model:
        try:
            for kind, ratio in whole_layer(options.topology, model).items():
                print(f"model = {model}: {kind} layer / formula {ratio:.3f}")
        except UserError as error:
            print(f"model = {model}: only the FFN, because {error}")
        counted = compiled_flops(Mesh(devices.reshape(-1, model), ("work", "model")))
        text = 6 * D * F * TEXT / model
        visual = (6 * D * UNITS * VISUAL + 4 * D * F * PROBES) / model
        tile = 6 * D * VISUAL * TILE
        declared = math.ceil(UNITS // model / TILE)
        tiles = tiles_of_the_busiest(model)
        drawn = [(counted - text + (n - declared) * tile) / visual for n in tiles]
        print(
            f"    FFN {counted / 1e9:.1f} GFLOP per chip, / formula {counted / (text + visual):.3f}; "
            f"its visual part / formula {(counted - text) / visual:.3f} for an even share"
        )
        print(
            f"    busiest of {model} shards, units at random: mean {np.mean(drawn):.3f}, "
            + ", ".join(f"{ratio:.3f} in {drawn.count(ratio) / len(drawn):.1%}" for ratio in sorted(set(drawn)))
        )


def whole_layer(topology: str, model: int) -> dict[str, float]:
    """FLOPs of one layer of the search's program over the formula. UserError if its heads cannot be cut."""
    check_fits(model_kind().config.decoder.sizes, model)
    layers, mesh_shape = layer_program(topology, model, batch=1)
    made = compile_program(layers, mesh_shape, resident_bytes=0, memory_limit=sys.maxsize)
    assert isinstance(made, CompiledProgram), made
    dense, reduced = made.costs["dense"].layer, made.costs["both"].layer
    assert dense is not None and reduced is not None
    decoder = model_kind().config.decoder
    sizes = decoder.layer_sizes
    formula = partial(layer_cost, sizes, TEXT, VISUAL, REDUCTION, with_probes=True)
    return {
        "dense": dense.flops * model / (2 * formula(attention=FULL, ffn=FULL)),
        "reduced": reduced.flops * model / (2 * formula(attention=STANDARD, ffn=STANDARD)),
    }


def compiled_flops(mesh: Mesh) -> float:
    """FLOPs of the FFN on one chip."""

    def local(x: jax.Array, layout: TokenLayout, stack: HalvedStack, layer: jax.Array) -> jax.Array:
        y, _ = dynamic_ffn(x, HalvedUnits(stack, layer), layout, REDUCTION, jax.random.key(0))
        return jax.lax.psum(y, "model")

    def array(shape: tuple[int, ...], dtype: type, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, Spec(*spec)))

    samples = mesh.shape["work"]
    positions = [array((samples, n), jnp.int32, "work") for n in (TEXT, VISUAL, TEXT)]
    layout = TokenLayout(*positions, *[array((samples,), jnp.int32, "work")] * 3)
    stack = HalvedStack(*[array((LAYERS, F, 2, D // 2), jnp.bfloat16, None, "model")] * 3)
    x = array((samples, TEXT + VISUAL, D), jnp.bfloat16, "work")
    arguments = (x, layout, stack, array((), jnp.int32))
    specs = jax.tree.map(lambda a: a.sharding.spec, arguments)
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=Spec("work"), check_vma=False)(local)
    module = parse_module(jax.jit(sharded).lower(*arguments).compile().as_text())
    # There is no loop over layers. The one loop of unknown count, for units over the capacity, counts as no iteration.
    return program_cost(module, Loops(module, layers=0), "both").total.flops


def tiles_of_the_busiest(model: int) -> list[int]:
    """Tiles of the shard with the most kept units, in 8000 random samples; none of them needs the loop."""
    owned = np.random.default_rng(0).multivariate_hypergeometric([F // model] * model, UNITS, size=8000)
    assert owned.max() <= shard_capacity(UNITS, model, HEADROOM)
    return np.ceil(owned.max(axis=1) / TILE).astype(int).tolist()


if __name__ == "__main__":
    main()
