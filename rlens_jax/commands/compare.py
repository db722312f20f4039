"""Compare plans and token-reduction methods with the dense model in one table: score, tokens, FLOPs, memory and measured times.

MODEL is a folder (published or converted), "embedded" (default) or a name on the Hugging Face hub. DATA is as for
rlens_jax.evaluate; its answers must be known. A METHOD is

    plan.json, opskip:llava-1.5-7b/12    a plan file, or a published policy
    {methods}
    plan.json+fastv@0.5                  one of these on top of a plan
    fastv                                a method at each of the budgets
    all                                  all of them that the model can have, at each of the budgets
    embedded-plan                        the plan that comes with the embedded model

A budget is the share of the visual tokens that a method keeps; vtw@8 names the layers that see them.

Each method answers all questions, each by itself (of the embedded model's pages 40 of each kind, unless there is a --limit), and
is timed in turns with the dense model on the same prompts. The output folder gets comparison.json (schema:
rlens_jax/evaluation/comparison.schema.json), comparison.csv, comparison.tex (a table for a paper), comparison.png and .svg
(Pareto plots), and report.html, one file. Answers and measurements are kept: after an interruption the same command resumes, and
further methods are added to those that are there.
"""

import dataclasses
from collections.abc import Sequence
from itertools import chain
from textwrap import fill

from rlens_jax.commands.options import (
    EMBEDDED,
    add_compute_options,
    add_model_argument,
    add_scoring_options,
    read_model,
    scoring_values,
)
from rlens_jax.config import PAGES
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.plan_file import PlanFile
from rlens_jax.pruning import METHODS

PAGES_TOKENS, PAGES_LIMIT = 32, 40
"""Defaults for the embedded model's pages: max length of an answer, a few words; questions of each kind."""


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print."""
    names = fill(", ".join(f"{name}@0.5" for name in ("downsample", *METHODS)), 120, subsequent_indent=4 * " ")
    parser = ArgumentParser("python -m rlens_jax.compare", (__doc__ or "").format(methods=names))
    add_model_argument(parser)
    methods_help = "what to compare, separated by commas or spaces (default: all; for the embedded model also embedded-plan)"
    parser.add_argument("--methods", metavar="METHOD", nargs="+", default=[], help=methods_help)
    budgets_help = "budgets of methods without one, separated by commas (default: 0.75,0.5,0.25)"
    parser.add_argument("--budgets", metavar="LIST", default="0.75,0.5,0.25", help=budgets_help)
    add_compute_options(parser)
    add_scoring_options(parser, "runs/compare", f"512; of the embedded model's pages always {PAGES_TOKENS}")
    options = parser.parse_args(arguments)
    model = read_model(parser, options) or EMBEDDED
    methods = tuple(chain.from_iterable(_listed(text) for text in options.methods))
    if not methods:
        if options.methods:
            parser.error("--methods names no method")
        methods = ("embedded-plan", "all") if model == EMBEDDED else ("all",)
    own = options.data in (None, [PAGES])
    if options.max_new_tokens is None and own:
        options.max_new_tokens = PAGES_TOKENS
    if options.limit is None and own:
        options.limit = PAGES_LIMIT

    from rlens_jax.evaluation.compare_run import CompareConfig, compare
    from rlens_jax.evaluation.evaluation import EvaluationConfig
    from rlens_jax.reporting.comparison_report import comparison_summary

    given = {item.name for item in dataclasses.fields(EvaluationConfig)}
    given -= {"model", "plan", "data", "md5", "baseline", "sharing"}
    values = scoring_values(parser, options, model, given)
    asking = EvaluationConfig(model=model, plan=PlanFile(), sharing=False, **values)
    config = CompareConfig(asking, methods, tuple(_listed(options.budgets)))
    show(comparison_summary(compare(config), asking.output))


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


if __name__ == "__main__":
    run_command(main)
