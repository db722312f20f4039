"""Measure what each level saves in one decoder layer, against the fastest dense layer, at the widths of published models.

    python benchmarks/level_saving.py [--visual 576] [--repeats 3] [MODEL ...]

Random weights, float32, batch 1, 64 text tokens before and 64 behind the visual tokens. The programs run in turns, and the least
CPU time of all threads is reported (`rlens_jax.bench --help` says why). Realised = share of time saved / share of FLOPs saved,
probes counted. The dense time is the fastest of four kinds of dense attention. On two idle CPU cores a model takes about two
minutes with 576 visual tokens.
"""

import argparse
import os

from rlens_jax.engine import timing
from rlens_jax.flops import PUBLISHED_DECODERS, layer_cost
from rlens_jax.plans import FULL, SKIP, STANDARD, TEXT, Level, Reduction

MODELS = {name: PUBLISHED_DECODERS[name] for name in ("llava-1.5-7b", "qwen2.5-vl-7b", "internvl3.5-8b")}
CASES: dict[str, tuple[Level, Level]] = {
    "range 256": (STANDARD, FULL),
    "attention to text": (TEXT, FULL),
    "attention skipped": (SKIP, FULL),
    "fraction 0.2": (FULL, STANDARD),
    "fraction 0.5": (FULL, 0.5),
    "ffn skipped": (FULL, SKIP),
    "frozen": (SKIP, SKIP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", choices=[[], *MODELS], help=", ".join(MODELS))
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    num_text = timing.TEXT_BEFORE + timing.TEXT_AFTER
    for model in options.models or MODELS:
        load = os.getloadavg()[0]
        programs = timing.layer_programs(MODELS[model], CASES, options.visual)
        programs.pop(timing.NO_ATTENTION)
        calls = list(programs.values())
        timing.warm_up(calls)
        measured = timing.time_turns(calls, options.repeats)
        seconds = {name: timing.deciding_seconds(turns) for name, turns in zip(programs, measured, strict=True)}
        fastest = min((name for name in seconds if name not in CASES), key=lambda name: seconds[name])
        dense = seconds[fastest]
        print(f"{model}: {num_text} text and {options.visual} visual tokens; load {load:.1f} on {os.cpu_count()} cores")
        print(f"  {'dense':<18}{dense * 1e3:9.1f} ms   {fastest}")

        def cost(attention: Level, ffn: Level, model: str = model) -> int:
            sizes = MODELS[model].layer_sizes
            return layer_cost(sizes, num_text, options.visual, Reduction(), attention=attention, ffn=ffn, with_probes=True)

        for name, levels in CASES.items():
            flops, time = 1 - cost(*levels) / cost(FULL, FULL), 1 - seconds[name] / dense
            saved = f"FLOPs saved {flops:6.1%}   time saved {time:6.1%}   realised {time / flops:.2f}"
            print(f"  {name:<18}{seconds[name] * 1e3:9.1f} ms   {saved}", flush=True)


if __name__ == "__main__":
    main()
