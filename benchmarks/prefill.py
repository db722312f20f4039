"""Measure how much of the FLOPs that a plan saves becomes saved time, in the prefill of a random model.

    python benchmarks/prefill.py [--repeats 5] [--layers 24] [--json FILE]

The sizes of LLaVA-OneVision-0.5B: 24 layers, 1792 visual tokens between 64 and 64 text tokens, float32, batch 1. The plan
reduces both operators in the last half of the layers. All stacks of layers are timed in turns, and medians are compared. As in
rlens_jax.bench, the dense time is the time of the fastest of four kinds of dense attention. PyTorch's layer with SDPA is timed in
addition, once per layer, if PyTorch is installed.

realised saving = (1 - time ratio) / (1 - FLOPs ratio), with the probes among the FLOPs. Expect 0.72 on two CPU cores with 24
layers, and some minutes.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rlens_jax.engine import timing
from rlens_jax.flops import PUBLISHED_DECODERS, saving
from rlens_jax.models.decoder import Context
from rlens_jax.ops.ffn import dense_ffn
from rlens_jax.plans import Plan, Reduction

DECODER = PUBLISHED_DECODERS["llava-onevision-0.5b"]
OURS, REDUCED, TORCH = "ours (packed, causal blocks)", "last half reduced", "PyTorch SDPA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements per stack")
    parser.add_argument("--layers", type=int, default=24, help="layers of the stack")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    half = tuple(range(options.layers // 2, options.layers))
    plan = Plan(half, half)
    programs = stacks(options.layers, plan)
    layer = timing.torch_layer(DECODER)
    if layer is not None:
        programs[TORCH] = lambda: [layer() for _ in range(options.layers)][-1]
    measured = dict(zip(programs, timing.time_side_by_side(list(programs.values()), options.repeats), strict=True))
    seconds = {name: median(values) for name, values in measured.items()}
    dense = min(value for name, value in seconds.items() if name not in (REDUCED, TORCH))
    visual = [timing.VISUAL] * options.layers
    flops_saved = saving(DECODER.layer_sizes, timing.TEXT_BEFORE + timing.TEXT_AFTER, visual, plan, Reduction(), with_probes=True)
    time_saved = 1 - seconds[REDUCED] / dense
    for name, value in seconds.items():
        print(f"{name:<34}{value * 1e3:9.1f} ms")
    print(f"FLOPs saved {flops_saved:.1%}, time saved {time_saved:.1%}, realised {time_saved / flops_saved:.2f}")
    if options.json:
        result = {
            "seconds": measured,
            "flops_saved": flops_saved,
            "time_saved": time_saved,
            "realised_saving": time_saved / flops_saved,
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def stacks(num_layers: int, plan: Plan) -> dict[str, Callable[[], Any]]:
    """All layers with each kind of dense attention, and under the plan, each as a call without arguments."""
    decoder, x, packed, in_order = timing.decoder_inputs(DECODER, num_layers)
    graph, state = nnx.split(decoder)

    def ours(plan: Plan) -> Callable[[], Any]:
        program = jax.jit(lambda state, context: nnx.merge(graph, state).prefill(x, context, plan, Reduction()))
        return lambda: program(state, packed)

    def other(attend: Callable[[Any, Any, Any], Any]) -> Callable[[], Any]:
        def run(state: Any, context: Context) -> Any:
            layers, stack = nnx.split(nnx.merge(graph, state).layers)

            def body(x: Any, weights: Any) -> tuple[Any, tuple[Any, Any]]:
                layer = nnx.merge(layers, weights)
                q, k, v = layer.attention.project(layer.input_norm(x), context.rotary)
                x = x + layer.attention.o_proj(attend(q, k, v))
                return x + dense_ffn(layer.ffn_norm(x), layer.ffn.weights), (k, v)

            return jax.lax.scan(body, x, stack)

        program = jax.jit(run)
        return lambda: program(state, in_order)

    causal = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
    kinds = timing.dense_kinds(causal)
    return {OURS: ours(Plan()), **{name: other(attend) for name, attend in kinds.items()}, REDUCED: ours(plan)}


if __name__ == "__main__":
    main()
