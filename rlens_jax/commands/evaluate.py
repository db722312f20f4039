"""Score a reduced model on data sets, and measure its speed.

MODEL is a folder (published or converted), "embedded" or a name on the Hugging Face hub. PLAN says which layers are reduced
(rlens_jax/plan_file.py): a JSON file written by hand, or a ranking.json together with --first. DATA is `pages` (the embedded
model's own data, exact match), the path of a TSV file of VLMEvalKit such as LMUData/MMStar.tsv (prompts and scores by its rules),
or a JSONL file (exact match).

The output folder gets evaluation.json (scores with 95 % intervals and FLOPs; schema:
rlens_jax/evaluation/evaluation.schema.json), timing.json (prefill, time to first token and tokens per second, dense and reduced
in the same run), report.html with both, and plan/NAME.tsv, predictions in VLMEvalKit's format. Answers are kept: after an
interruption the same command resumes. Questions about the same images share what is computed for these, unless the plan prunes
visual tokens.
"""

import dataclasses
from collections.abc import Sequence

from rlens_jax.commands.options import add_model_options, add_scoring_options, read_plan_options, required_model, scoring_values
from rlens_jax.console import ArgumentParser, run_command, show


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print."""
    parser = ArgumentParser("python -m rlens_jax.evaluate", __doc__)
    add_model_options(parser)
    add_scoring_options(parser, "runs/evaluate", "512")
    parser.add_argument("--baseline", action="store_true", help="also answer with the dense model, and report the differences")
    sharing_help = "compute each question alone, also where several are about the same images"
    parser.add_argument("--no-sharing", dest="sharing", action="store_false", help=sharing_help)
    options = parser.parse_args(arguments)
    model, plan = required_model(parser, options), read_plan_options(parser, options)

    from rlens_jax.evaluation.evaluation import EvaluationConfig, summary
    from rlens_jax.evaluation.evaluation_run import evaluate

    names = {item.name for item in dataclasses.fields(EvaluationConfig)} - {"model", "plan", "data", "md5"}
    config = EvaluationConfig(model=model, plan=plan, **scoring_values(parser, options, model, names))
    show(summary(evaluate(config)))


if __name__ == "__main__":
    run_command(main)
