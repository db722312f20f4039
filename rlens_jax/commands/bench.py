"""Measure the time that the reductions save in one decoder layer, against the fastest dense layer.

The layer has the widths of a published model and random weights. The input is 1792 visual tokens between 64 and 64 text tokens,
float32, batch 1. The programs run in turn, and medians are reported. Realised saving = (1 - time ratio) / (1 - FLOPs ratio), with
FLOPs by the usual formula, probes included. The dense time is the fastest of four kinds of dense attention. "no attention" is a
layer whose heads attend to nothing: the most that any attention could save. If the extra `torch` is installed, PyTorch's layer
with SDPA is timed too, for orientation.
"""

from collections.abc import Sequence

from rlens_jax.commands.options import add_json_option
from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.files import json_text, replace_file
from rlens_jax.flops import PUBLISHED_DECODERS


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = ArgumentParser("python -m rlens_jax.bench", __doc__)
    parser.add_argument("--layer", choices=PUBLISHED_DECODERS, default="qwen2-vl-2b", help="the model (default: %(default)s)")
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="measurements per program (default: 15)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    from rlens_jax.engine.timing import NO_ATTENTION, time_layer

    results = time_layer(options.layer, options.repeats)
    for name, seconds in results["dense_seconds"].items():
        print(f"dense, {name:<34}{seconds * 1e3:9.1f} ms")
    without = results["without_attention"]
    print(f"{NO_ATTENTION:<12}{without['seconds'] * 1e3:9.1f} ms   {'':20} time saved {without['time_saved']:6.1%}")
    for name, case in results["cases"].items():
        print(
            f"{name:<12}{case['seconds'] * 1e3:9.1f} ms   FLOPs saved {case['flops_saved']:6.1%}   "
            f"time saved {case['time_saved']:6.1%}   realised {case['realised_saving']:.2f}"
        )
    if options.json:
        replace_file(options.json, json_text(results).encode())


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
