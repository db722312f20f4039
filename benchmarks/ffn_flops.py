"""FLOPs of a Dynamic FFN on one chip against the formula with probes, as XLA counts them for a TPU slice that need not exist.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/ffn_flops.py      (libtpu must be installed)

Qwen2-VL-7B, 384 text and 1664 visual tokens, one sample a work group. XLA counts the body of the overflow loop once, as if every
layer had one tile over the capacity; the second number takes that tile out, which is the usual case. How often units that are
spread at random need the loop is drawn beside it.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.ffn import TILE, FfnWeights, dynamic_ffn, shard_capacity
from rlens_jax.plan import Reduction

TEXT, VISUAL, D, F = 384, 1664, 3584, 18944
REDUCTION = Reduction()
UNITS, PROBES = REDUCTION.kept_units(F), REDUCTION.probe_count(VISUAL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--model", type=int, nargs="+", default=[1, 4, 8], help="sizes of the model axis")
    options = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices)
    for model in options.model:
        counted = compiled_flops(Mesh(devices.reshape(-1, model), ("work", "model")))
        text = 6 * D * F * TEXT / model
        visual = (6 * D * UNITS * VISUAL + 4 * D * F * PROBES) / model
        capacity = shard_capacity(UNITS, model)
        loop = 6 * D * VISUAL * min(TILE, capacity) if model > 1 else 0
        any_shard, tiles = overflow(model, capacity)
        print(
            f"model = {model}: {counted / 1e9:.1f} GFLOP a chip; "
            f"visual part / formula {(counted - text) / visual:.3f} as counted, "
            f"{(counted - loop - text) / visual:.3f} without overflow; "
            f"whole FFN / formula {(counted - loop) / (text + visual):.3f}"
        )
        print(
            f"    capacity {capacity} of {UNITS / model:.0f}: overflow in {any_shard:.1%} of the samples, "
            f"{tiles:.2f} tiles on the busiest shard for 8 samples"
        )


def compiled_flops(mesh: Mesh) -> float:
    """What XLA counts for one chip."""

    def local(x: jax.Array, layout: TokenLayout, weights: FfnWeights) -> jax.Array:
        y, _ = dynamic_ffn(x, weights, layout, REDUCTION, jax.random.key(0))
        return jax.lax.psum(y, "model")

    def array(shape: tuple[int, ...], dtype: type, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, Spec(*spec)))

    samples = mesh.shape["work"]
    positions = [array((samples, n), jnp.int32, "work") for n in (TEXT, VISUAL)]
    layout = TokenLayout(*positions, *[array((samples,), jnp.int32, "work")] * 3)
    weights = FfnWeights(*[array((F, 2, D // 2), jnp.bfloat16, "model")] * 3)
    arguments = (array((samples, TEXT + VISUAL, D), jnp.bfloat16, "work"), layout, weights)
    specs = jax.tree.map(lambda a: a.sharding.spec, arguments)
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=Spec("work"), check_vma=False)(
        local
    )
    return jax.jit(sharded).lower(*arguments).compile().cost_analysis()["flops"]


def overflow(model: int, capacity: int) -> tuple[float, float]:
    """Share of samples with a shard over its capacity, and tiles of the busiest shard in a batch of 8."""
    owned = np.random.default_rng(0).multivariate_hypergeometric([F // model] * model, UNITS, size=8000)
    tiles = np.ceil(np.maximum(owned - capacity, 0) / TILE)
    return float(tiles.any(axis=1).mean()), float(tiles.reshape(-1, 8, model).sum(axis=1).max(axis=1).mean())


if __name__ == "__main__":
    main()
