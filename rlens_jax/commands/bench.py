"""Measure the time that the reductions save in one decoder layer, against the fastest dense layer.

The layer has the widths of MODEL, of which only config.json is read, and random weights. The input is 1792 visual tokens (or
--visual-tokens) between 64 and 64 text tokens, float32, batch 1. The programs run in turns of changing order. Where JAX
computes on a CPU, the least CPU time of all threads decides: other work on the machine can only add to a time, and adds more to
that of the clock. On an accelerator the least time by the clock decides. The clock's median and spread are shown beside it.

Realised saving = (1 - time ratio) / (1 - FLOPs ratio), with FLOPs by the usual formula, probes included. The dense time is the
fastest of four kinds of dense attention. "no attention" is a layer whose heads attend to nothing: the most that any attention
could save. If the extra `torch` is installed, PyTorch's layer with SDPA is timed too, for orientation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlens_jax.commands.options import SHORT_NAME, add_json_option, add_model_argument, find_decoder, read_model
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.files import json_text, replace_file

DEFAULT = "qwen2-vl-2b"


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = ArgumentParser("python -m rlens_jax.bench", __doc__)
    add_model_argument(parser, kinds=f"{SHORT_NAME} (default: {DEFAULT})")
    tokens_help = "visual tokens of the input (default: %(default)s)"
    parser.add_argument("--visual-tokens", metavar="N", type=int, default=1792, help=tokens_help)
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="measurements per program (default: %(default)s)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    for name in ("repeats", "visual_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    model = read_model(parser, options) or DEFAULT
    decoder = find_decoder(model)
    from rlens_jax.engine.timing import NO_ATTENTION, time_layer

    results = time_layer(model, decoder, options.visual_tokens, options.repeats)
    show(f"{model}, {options.visual_tokens} visual tokens; {results['decides']} time decides")
    for name, found in results["dense"].items():
        show(f"{'dense, ' + name:<41}{_times(found)}")
    without = results["without_attention"]
    show(f"{NO_ATTENTION:<41}{_times(without)}   time saved {without['time_saved']:6.1%}")
    for name, case in results["cases"].items():
        by_clock = f"by the clock's median {case['time_saved_by_median_wall']:6.1%}"
        saved = f"FLOPs saved {case['flops_saved']:6.1%}   time saved {case['time_saved']:6.1%} ({by_clock})"
        realised = "" if case["realised_saving"] is None else f"   realised {case['realised_saving']:.2f}"
        show(f"{name:<41}{_times(case)}   {saved}{realised}")
    if options.json:
        replace_file(options.json, json_text(results).encode())


def _times(found: Mapping[str, Any]) -> str:
    wall = found["times"]["wall"]
    least, middle, most = (1e3 * value for value in (wall["least"], wall["median"], wall["least"] * wall["spread"]))
    return f"{found['seconds'] * 1e3:9.1f} ms (clock: least {least:.1f}, median {middle:.1f}, most {most:.1f})"


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
