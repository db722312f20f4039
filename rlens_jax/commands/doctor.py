"""Examine the devices that JAX has: what works, how exactly, and how fast.

It checks every fast path against the plain reference, on this device and against values made on a CPU, collectives between the
devices, and the compilation cache. Then it times one layer of MODEL's widths, dense and at each operator setting, with 1792 and
8192 visual tokens, as far as --seconds allow, beside the prediction of the dry run. Send the file of --json back with a report of
a problem. A kernel of Pallas or cuDNN that fails is replaced by plain XLA, with a line; --strict makes that an error. Exit code 1
says that something failed.
"""

import sys
from collections.abc import Sequence
from typing import Any

from rlens_jax.commands.options import SHORT_NAME, add_json_option, add_model_argument, find_decoder, read_model
from rlens_jax.console import ArgumentParser, run_command, say, show
from rlens_jax.files import json_text, replace_file

DEFAULT, VISUAL_TOKENS, SECONDS = "qwen2-vl-7b", (1792, 8192), 240.0
FAILED = 1
"""Exit code."""


def main(arguments: Sequence[str]) -> None:
    """Parse, examine, print."""
    parser = ArgumentParser("python -m rlens_jax.doctor", __doc__)
    add_model_argument(parser, kinds=f"{SHORT_NAME} (default: {DEFAULT})")
    parser.add_argument("--strict", action="store_true", help="count a kernel that plain XLA replaces as a failure")
    seconds_help = "no timing starts that would end later (default: %(default)g)"
    parser.add_argument("--seconds", metavar="N", type=float, default=SECONDS, help=seconds_help)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, not {options.seconds}")
    model = read_model(parser, options) or DEFAULT
    sizes = find_decoder(model)
    from rlens_jax.device_checks.examination import examine, failures
    from rlens_jax.engine.startup import start_jax

    start_jax()
    report = examine(model, sizes, VISUAL_TOKENS, options.seconds)
    _show(report)
    if options.json:
        replace_file(options.json, json_text(report).encode())
    if failed := failures(report, strict=options.strict):
        say(f"failed: {', '.join(failed)}")
        sys.exit(FAILED)


def _show(report: dict[str, Any]) -> None:
    devices, cache, layer = report["devices"], report["cache"], report["layer"]
    memory = f", {devices['memory_bytes'] / 2**30:.1f} GiB each" if devices["memory_bytes"] else ""
    show(f"{devices['count']} x {devices['kind']} ({devices['platform']}){memory}; jax {report['versions']['jax']}")
    for each in report["checks"]:
        found = each["error"] or f"{each['difference']:.1e} (at most {each['tolerance']:.0e})"
        how = (" against a CPU" if each["against"] == "cpu" else "") + (" (interpreted)" if each["interpreted"] else "")
        show(f"{_mark(each['passed'])}  {each['name']}, {each['dtype']}{how}: {found}")
    for each in report["collectives"]:
        taken = each["error"] or f"{1e3 * each['seconds']:.2f} ms"
        what = f"{each['name']} of {each['bytes'] >> 20} MiB over {each['devices']} devices"
        show(f"{_mark(each['right'])}  {what}: {taken}")
    show(f"{_mark(cache['written'] and cache['read'])}  compilation cache in {cache['folder']}")
    for way in report["ffn_ways"]:
        what = f"kept FFN units, {way['batch']} x {way['visual_tokens']} visual tokens"
        times = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in way["seconds"].items())
        show(f"{what}: {times}; taken: {way['taken']}")
    for table in layer["tables"]:
        how = f"{table['dtype']}, {table['kernel']} attention, kept FFN units {table['ffn_way']}"
        show(f"a layer of {layer['model']}, {table['visual_tokens']} visual tokens, {how}")
        if table["left_out"]:
            show(f"  not timed: {table['left_out']}")
        for row in table["times"]:
            predicted = "" if row["predicted"] is None else f"   predicted {1e3 * row['predicted']:9.2f} ms"
            realised = "" if row["realised_saving"] is None else f"   realised {row['realised_saving']:5.2f}"
            saved = f"FLOPs saved {row['flops_saved']:6.1%}   time saved {row['time_saved']:6.1%}"
            show(f"  {row['setting']:<15}{1e3 * row['deciding_seconds']:10.2f} ms{predicted}   {saved}{realised}")


def _mark(passed: bool) -> str:
    return "pass" if passed else "FAIL"


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
