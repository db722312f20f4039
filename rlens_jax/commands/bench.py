"""Measure the time that the reductions save in one decoder layer, against the fastest dense layer.

The layer has the widths of MODEL, of which only config.json is read, and random weights. The input is 1792 visual tokens between
64 and 64 text tokens, float32, batch 1. The programs run in turn, and medians are reported. Realised saving = (1 - time ratio) /
(1 - FLOPs ratio), with FLOPs by the usual formula, probes included. The dense time is the fastest of four kinds of dense
attention. "no attention" is a layer whose heads attend to nothing: the most that any attention could save. If the extra `torch`
is installed, PyTorch's layer with SDPA is timed too, for orientation.
"""

from collections.abc import Sequence

from rlens_jax.commands.options import SHORT_NAME, add_json_option, add_model_argument, find_decoder, read_model
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.files import json_text, replace_file

DEFAULT = "qwen2-vl-2b"


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = ArgumentParser("python -m rlens_jax.bench", __doc__)
    add_model_argument(parser, kinds=f"{SHORT_NAME} (default: {DEFAULT})")
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="measurements per program (default: 15)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    model = read_model(parser, options) or DEFAULT
    decoder = find_decoder(model)
    from rlens_jax.engine.timing import NO_ATTENTION, time_layer

    results = time_layer(model, decoder, options.repeats)
    for name, seconds in results["dense_seconds"].items():
        show(f"dense, {name:<34}{seconds * 1e3:9.1f} ms")
    without = results["without_attention"]
    show(f"{NO_ATTENTION:<12}{without['seconds'] * 1e3:9.1f} ms   {'':20} time saved {without['time_saved']:6.1%}")
    for name, case in results["cases"].items():
        show(
            f"{name:<12}{case['seconds'] * 1e3:9.1f} ms   FLOPs saved {case['flops_saved']:6.1%}   "
            f"time saved {case['time_saved']:6.1%}   realised {case['realised_saving']:.2f}"
        )
    if options.json:
        replace_file(options.json, json_text(results).encode())


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
