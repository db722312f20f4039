"""Score a reduced model on data sets, and measure its speed.

MODEL is a folder (published or converted), "embedded" or a name on the Hugging Face hub. PLAN says which layers are reduced
(rlens_jax/plan_file.py): a JSON file written by hand, or a ranking.json together with --first. DATA is `pages` (the embedded
model's own data, exact match), the path of a TSV file of VLMEvalKit such as LMUData/MMStar.tsv (prompts and scores by its rules),
or a JSONL file (exact match).

The output folder gets evaluation.json (scores with 95 % intervals and FLOPs; schema:
rlens_jax/evaluation/evaluation.schema.json), timing.json (prefill, time to first token and tokens per second, dense and reduced
in the same run) and plan/NAME.tsv, predictions in VLMEvalKit's format. Answers are kept: after an interruption the same command
resumes. Questions about the same images share what is computed for these, unless the plan prunes visual tokens.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rlens_jax.commands.options import (
    EMBEDDED,
    add_model_options,
    add_restart_option,
    new_folder,
    read_plan_options,
    required_model,
)
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.metrics.score import CURRENT, RULES


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print."""
    parser = ArgumentParser("python -m rlens_jax.evaluate", __doc__)
    add_model_options(parser)
    parser.add_argument("--data", metavar="DATA", nargs="+", help="data sets (default for the embedded model: pages)")
    output_help = "folder for results (default: %(default)s)"
    parser.add_argument("--output", metavar="DIR", type=new_folder, default=Path("runs/evaluate"), help=output_help)
    parser.add_argument("--baseline", action="store_true", help="also answer with the dense model, and report the differences")
    parser.add_argument("--limit", metavar="N", type=int, help="use only the first N questions of each data set")
    md5_help = "use a version of NAME.tsv that is not the published one; repeat for further files"
    parser.add_argument("--md5", metavar="NAME=SUM", action="append", default=[], help=md5_help)
    for name, default, text in (
        ("max-new-tokens", 512, "max tokens per answer"),
        ("batch-size", 8, "prompts per batch of a work group"),
        ("bootstrap-samples", 1000, "draws of the bootstrap behind the intervals"),
        ("timing-repeats", 5, "measurements per time; 0 measures nothing"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{text} (default: %(default)s)")
    rules_help = f"VLMEvalKit's rules for benchmarks of {' or '.join(RULES)}, which differ in multiple choice and ChartQA"
    parser.add_argument("--rules", metavar="MONTH", default=CURRENT, help=f"{rules_help} (default: %(default)s)")
    images_help = "images of benchmarks as in the file, or compressed again as VLMEvalKit did until 2026 (default: %(default)s)"
    parser.add_argument("--images", choices=("as_published", "recompressed"), default="as_published", help=images_help)
    sharing_help = "compute each question alone, also where several are about the same images"
    parser.add_argument("--no-sharing", dest="sharing", action="store_false", help=sharing_help)
    skip_help = "go on where an image or a prompt cannot be used, and count the question as wrong"
    parser.add_argument("--skip-unusable", action="store_true", help=skip_help)
    add_restart_option(parser)
    options = parser.parse_args(arguments)
    model, plan = required_model(parser, options), read_plan_options(parser, options)
    if options.data is None and model != EMBEDDED:
        parser.error("--data DATA is missing: name the data to score the model on")

    from rlens_jax.data.benchmarks.catalogue import named_sum
    from rlens_jax.evaluation.evaluation import EvaluationConfig, summary
    from rlens_jax.evaluation.evaluation_run import evaluate

    names = {item.name for item in dataclasses.fields(EvaluationConfig)} - {"model", "plan", "data", "md5"}
    config = EvaluationConfig(
        model=model,
        plan=plan,
        data=tuple(options.data or ["pages"]),
        md5=dict(named_sum(text, parser.error) for text in options.md5),
        **{name: getattr(options, name) for name in names},
    )
    show(summary(evaluate(config)))


if __name__ == "__main__":
    run_command(main)
