"""Time and size of compiling the search's program of a decoder's layers for a TPU slice, for one number of layers and for twice.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/compile_time.py      (libtpu must be installed; some minutes)

The loop over layers is compiled once, so neither should depend on how many there are. Qwen2-VL-7B's sizes; seconds are those of
all cores together, the least of `--repeats`, since the machine may have other work.
"""

import argparse
import time

import jax
from layer_program import layer_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--model", type=int, default=4, help="size of the model axis")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=2)
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
