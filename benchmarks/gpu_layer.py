"""Time one decoder layer and a whole prefill on a GPU beside PyTorch on the same card, and check the numbers against a CPU.

    python benchmarks/gpu_layer.py --json gpu_layer.json      (extras `cuda` and `torch`; at most eight minutes)

The widths of Qwen2-VL-7B, random weights, bfloat16, 64 text tokens before and 64 behind the visual tokens. In this order, each
part only if there is time for it:

1. Numbers: all layers, both reductions in the later half, with few visual tokens. The logits are compared with those of plain
   XLA in float32 on the CPU, layer by layer from the same weights, with the FFN units imposed that the device chose: near the
   last unit the two dtypes may choose others (docs/method.md). At most 2e-2.
2. One layer for each batch size and number of visual tokens: dense, each operator, both, and PyTorch's dense layer with its
   scaled_dot_product_attention. Realised = share of time saved / share of FLOPs saved, probes counted.
3. The whole prefill, dense and with both reductions in the later half, beside as many dense layers of PyTorch.

What is timed takes turns, and the least time by the clock counts. A turn launches a call several times and waits for the last,
so that launching costs no time. Without a GPU the same runs on the CPU in float32, which proves the script and nothing else:

    python benchmarks/gpu_layer.py --model embedded --visual 96 --batches 1 2

No GPU was at hand when this was written. The bars are: realised at least 0.8 for FFN and both, and a dense layer within 1.15 of
PyTorch's.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlens_jax.commands.options import find_decoder
from rlens_jax.engine import timing
from rlens_jax.engine.choices import chosen_dtype
from rlens_jax.flops import DecoderSizes, layer_cost, saving
from rlens_jax.models.decoder import Context, Decoder
from rlens_jax.models.forward import attend, feed
from rlens_jax.ops.attention import suited_kernel
from rlens_jax.plans import FULL, Level, Plan, Reduction
from rlens_jax.resources import versions

SETTINGS: dict[str, tuple[Level, Level]] = {"dense": (FULL, FULL), **timing.CASES}
TORCH, HALF = "PyTorch SDPA", "both in the later half"
TEXT = timing.TEXT_BEFORE + timing.TEXT_AFTER
CHECKED_VISUAL, VOCABULARY = 448, 512
CALLS, REPEATS, PREFILL_REPEATS = 10, 7, 3
TOLERANCE = 2e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2-vl-7b", help="a short name, or a checkpoint's folder (default: %(default)s)")
    parser.add_argument("--visual", type=int, nargs="+", default=[1792, 8192], help="numbers of visual tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=450, help="no part starts after them (default: %(default)g)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    deadline, device = time.monotonic() + options.seconds, jax.devices()[0]
    sizes = find_decoder(options.model)
    dtype = chosen_dtype(None, device.platform)
    kernel = suited_kernel(device, dtype, sizes.head_dim)
    result: dict[str, Any] = {
        "schema": "rlens-gpu-layer/1",
        "versions": versions(),
        "device": device.device_kind,
        "model": options.model,
        "dtype": dtype,
        "kernel": kernel,
        "text_tokens": TEXT,
    }
    print(f"{options.model}, {dtype}, {kernel} attention on {device.device_kind}", flush=True)
    inputs = partial(timing.decoder_inputs, sizes, dtype=dtype, kernel=kernel)
    result["numbers"] = numbers(*inputs(sizes.num_layers, min(CHECKED_VISUAL, *options.visual), vocabulary=VOCABULARY)[:3])
    result["layer"] = each(layer_times, options, deadline, sizes, inputs, device.platform == "gpu")
    result["prefill"] = each(prefill_times, options, deadline, sizes, inputs, device.platform == "gpu")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def each(measure: Callable[..., dict[str, Any]], options: argparse.Namespace, deadline: float, *arguments: Any) -> list[Any]:
    """What is measured for each number of visual tokens and batch size, as far as there are time and memory."""
    found = []
    for visual in options.visual:
        for batch in options.batches:
            about: dict[str, Any] = {"visual_tokens": visual, "batch": batch}
            if time.monotonic() > deadline:
                found.append({**about, "left_out": "no time was left"})
            else:
                try:
                    found.append(about | measure(visual, batch, *arguments))
                except (jax.errors.JaxRuntimeError, RuntimeError) as error:  # out of memory, in JAX or in PyTorch
                    found.append({**about, "left_out": str(error).splitlines()[0][:200]})
            print(json.dumps(found[-1]), flush=True)
    return found


def numbers(decoder: Decoder, x: Any, context: Context) -> dict[str, Any]:
    """The largest difference of the logits from the CPU's, relative to the largest logit."""
    plan, reduction, stack = later_half(decoder.config.num_layers), Reduction(), nnx.split(decoder.layers)
    exact, plainly = on_cpu((x, replace(context, kernel="packed")))
    for layer in range(decoder.config.num_layers):
        attention, ffn = plan.level("attention", layer), plan.level("ffn", layer)
        alone = on_cpu(jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], stack))
        x, exact = attend(stack, layer, x, context, reduction, attention), attend(alone, 0, exact, plainly, reduction, attention)
        x, kept = feed(stack, layer, x, context, reduction, ffn, None)
        imposed = None if ffn == FULL else jax.device_put(kept.units, jax.devices("cpu")[0])
        exact, _ = feed(alone, 0, exact, plainly, reduction, ffn, imposed)
    # The head is tied (`decoder_inputs`), and its copy in float32 would bring all layers along.
    normed = nnx.merge(*on_cpu(nnx.split(decoder.norm)))(exact)
    wanted = np.asarray(normed) @ np.asarray(decoder.embedding[...], np.float32).T
    off = float(np.abs(np.asarray(decoder.logits(x)) - wanted).max() / max(1.0, np.abs(wanted).max()))
    print(f"logits off by {off:.1e} of the largest, {np.abs(wanted).max():.1f} (at most {TOLERANCE:.0e})", flush=True)
    return {"visual_tokens": context.layout.bucket.visual, "difference": off, "tolerance": TOLERANCE, "passed": off <= TOLERANCE}


def on_cpu(arrays: Any) -> Any:
    """Copies on the CPU, floating ones in float32."""

    def put(leaf: Any) -> Any:
        here = jax.device_put(leaf, jax.devices("cpu")[0])
        return here.astype(jnp.float32) if jnp.issubdtype(here.dtype, jnp.floating) else here

    return jax.tree.map(put, arrays)


def layer_times(visual: int, batch: int, sizes: DecoderSizes, inputs: Callable[..., Any], on_gpu: bool) -> dict[str, Any]:
    """One layer in each setting, and PyTorch's."""
    decoder, x, context, _ = inputs(1, visual, batch=batch)
    graph, state = nnx.split(decoder.layer(0))

    def layer(attention: Level, ffn: Level, state: Any, x: Any, context: Context) -> Any:
        return nnx.merge(graph, state)(x, context, Reduction(), attention, ffn, jnp.int32(0))[0]

    calls = {name: partial(jax.jit(partial(layer, *levels)), state, x, context) for name, levels in SETTINGS.items()}
    seconds = least_seconds(calls, sizes, visual, batch, on_gpu, CALLS if on_gpu else 1, REPEATS)
    cost = partial(layer_cost, sizes.layer_sizes, TEXT, visual, Reduction(), with_probes=True)
    flops = {name: 1 - cost(attention=a, ffn=f) / cost(attention=FULL, ffn=FULL) for name, (a, f) in SETTINGS.items()}
    return compared(seconds, flops)


def prefill_times(visual: int, batch: int, sizes: DecoderSizes, inputs: Callable[..., Any], on_gpu: bool) -> dict[str, Any]:
    """All layers, dense and with both reductions in the later half, and as many layers of PyTorch's."""
    decoder, x, context, _ = inputs(sizes.num_layers, visual, batch=batch)
    graph, state = nnx.split(decoder)

    def prefill(plan: Plan, state: Any, x: Any, context: Context) -> Any:
        # Keys and values are kept, as for an answer.
        y, record = nnx.merge(graph, state).prefill(x, context, plan, Reduction())
        return y, record.k, record.v

    plans = {"dense": Plan(), HALF: later_half(sizes.num_layers)}
    calls = {name: partial(jax.jit(partial(prefill, plan)), state, x, context) for name, plan in plans.items()}
    seconds = least_seconds(calls, sizes, visual, batch, on_gpu, 1, PREFILL_REPEATS, layers=sizes.num_layers)
    share = saving(sizes.layer_sizes, TEXT, [visual] * sizes.num_layers, plans[HALF], Reduction(), with_probes=True)
    return compared(seconds, {"dense": 0.0, HALF: share})


def later_half(layers: int) -> Plan:
    """Both reductions in the later half."""
    half = tuple(range(layers // 2, layers))
    return Plan(half, half)


def least_seconds(
    calls: dict[str, Callable[[], Any]],
    sizes: DecoderSizes,
    visual: int,
    batch: int,
    on_gpu: bool,
    times: int,
    repeats: int,
    layers: int = 1,
) -> dict[str, float]:
    """The least seconds of each call and of `layers` dense layers of PyTorch, if it is installed and has the device."""

    def turn(call: Callable[[], Any]) -> Any:
        for _ in range(times):
            result = call()
        return result

    turns = {name: partial(turn, call) for name, call in calls.items()}
    torch_layers = timing.torch_layer(sizes, visual, batch, times * layers, on_gpu=on_gpu)
    if torch_layers is not None:
        turns[TORCH] = torch_layers
    measured = timing.time_side_by_side(list(turns.values()), repeats)
    return {name: min(values) / times for name, values in zip(turns, measured, strict=True)}


def compared(seconds: dict[str, float], flops_saved: dict[str, float]) -> dict[str, Any]:
    """Times, and what each setting saves against the dense one."""
    saved = {name: 1 - seconds[name] / seconds["dense"] for name in flops_saved}
    realised = {name: saved[name] / share for name, share in flops_saved.items() if share}
    found = {"seconds": seconds, "flops_saved": flops_saved, "time_saved": saved, "realised": realised}
    if TORCH in seconds:
        found["times_pytorch"] = {name: value / seconds[TORCH] for name, value in seconds.items() if name != TORCH}
    return found


if __name__ == "__main__":
    main()
