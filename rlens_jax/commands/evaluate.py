"""Score a reduced model: `python -m rlens_jax.evaluate MODEL --plan PLAN --data DATA [DATA ...] --output DIR`.

MODEL is a folder (published or converted) or "embedded". PLAN says which layers are reduced (rlens_jax/plan_file.py): a JSON
file written by hand, or a ranking.json together with --first; without it the model is dense. DATA is `pages` (the embedded
model's own, exact match), the path of a TSV file of VLMEvalKit's such as LMUData/MMStar.tsv (prompts and scores by its rules), or
a JSONL file (exact match).

DIR gets evaluation.json (scores with 95 % intervals, FLOPs; its schema is rlens_jax/evaluation/evaluation.schema.json),
timing.json (prefill, time to first token and tokens per second, dense and reduced in the same run) and plan/NAME.tsv, predictions
as VLMEvalKit has them. What is answered is kept: the same command goes on from there after an interruption.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rlens_jax.commands.options import add_model_options
from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.plan_file import plan_of
from rlens_jax.resources import cache_folder


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print."""
    parser = ArgumentParser(prog="python -m rlens_jax.evaluate", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--data", metavar="DATA", nargs="+", default=["pages"], help="default: pages")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("runs/evaluate"), help="default: %(default)s"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="answer with the dense model, too, and report the differences"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N questions of each dataset")
    parser.add_argument(
        "--md5",
        metavar="NAME=SUM",
        action="append",
        default=[],
        help="use a version of NAME.tsv that is not the published one; can be given several times",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="the longest answer")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="prompts read together")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of random probes and the bootstrap")
    parser.add_argument("--bootstrap-samples", metavar="N", type=int, default=1000, help="behind the intervals")
    parser.add_argument(
        "--timing-repeats", metavar="N", type=int, default=5, help="of each measurement; 0 measures nothing"
    )
    options = parser.parse_args(arguments)
    plan = plan_of(options.plan, options.first, parser.error)

    from rlens_jax.data.benchmarks.catalogue import named_sum
    from rlens_jax.evaluation.evaluation_config import EvaluationConfig
    from rlens_jax.evaluation.evaluation_results import summary
    from rlens_jax.evaluation.evaluation_run import evaluate
    from rlens_jax.hosts.startup import start_jax

    names = {item.name for item in dataclasses.fields(EvaluationConfig)} - {"plan", "data", "md5"}
    config = EvaluationConfig(
        plan=plan,
        data=tuple(options.data),
        md5=dict(named_sum(text, parser.error) for text in options.md5),
        **{name: getattr(options, name) for name in names},
    )
    start_jax("highest", cache_folder() / "compiled")
    print(summary(evaluate(config)))


if __name__ == "__main__":
    run_command(main)
