"""Measure how compile time and program size depend on the number of layers.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/compile_time.py      (needs libtpu; takes some minutes)

Compiles the search's program of decoder layers, with the sizes of Qwen2-VL-7B, for a TPU slice that need not exist, with some
number of layers and with twice that. The loop over layers is compiled once, so expect ratios of about 1. Seconds are CPU seconds
of all cores, the minimum of `--repeats`.
"""

import argparse
import time

import jax
from layer_program import layer_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="the TPU slice")
    parser.add_argument("--model", type=int, default=4, help="size of the model axis")
    parser.add_argument("--layers", type=int, default=28, help="the smaller number of layers")
    parser.add_argument("--repeats", type=int, default=2, help="compilations per number of layers")
    options = parser.parse_args()
    seconds, size = {}, {}
    for layers in (options.layers, 2 * options.layers):
        taken = []
        for _ in range(options.repeats):
            jax.clear_caches()
            lowered = layer_program(options.topology, options.model, batch=1, layers=layers)[0].lower()
            began = time.process_time()
            compiled = lowered.compile()
            taken.append(time.process_time() - began)
        seconds[layers] = min(taken)
        size[layers] = compiled.memory_analysis().generated_code_size_in_bytes
        print(f"{layers} layers: {seconds[layers]:.1f} CPU seconds, {size[layers] / 1e6:.1f} MB of program")
    for name, values in (("seconds", seconds), ("size", size)):
        fewer, more = values.values()
        print(f"{name}: {more / fewer:.3f} times as much for twice the layers")


if __name__ == "__main__":
    main()
