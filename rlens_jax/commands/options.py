"""Options that several commands share, each declared once."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rlens_jax import console
from rlens_jax.config import DTYPES
from rlens_jax.plan_file import PlanFile, parse_first, read_plan


def add_plan_options(parser: ArgumentParser) -> None:
    """The options of `read_plan_options`: --plan and --first."""
    parser.add_argument("--plan", metavar="PLAN", type=Path, help="plan file or ranking.json (default: the dense model)")
    parser.add_argument("--first", metavar="LIST", help="with a ranking.json: number of layers to reduce, as attention=11,ffn=5")


def read_plan_options(parser: console.ArgumentParser, options: Namespace) -> PlanFile:
    """The plan that --plan and --first name. UserError as `read_plan` and `parse_first`."""
    if options.plan is None:
        if options.first is not None:
            parser.error("--first needs a --plan that is a ranking.json")
        return PlanFile()
    return read_plan(options.plan, None if options.first is None else parse_first(options.first))


def add_dtype_option(parser: ArgumentParser) -> None:
    """--dtype of weights and computation."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation (default: float32)")


def add_model_options(parser: ArgumentParser) -> None:
    """The model, its plan, and how it is computed."""
    parser.add_argument("model", metavar="MODEL", help='a model folder, or "embedded"')
    add_plan_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--model-shards", metavar="N", type=int, default=1, help="devices per copy of the model (default: 1)")
    parser.add_argument("--chunk", metavar="N", type=int, help="prompt tokens per step of an FFN (default: by size)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of random probes and draws (default: 0)")


def add_json_option(parser: ArgumentParser) -> None:
    """--json, a file for the results."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results to this file")
