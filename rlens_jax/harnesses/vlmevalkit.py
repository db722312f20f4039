"""Run VLMEvalKit with a plan as its model.

    python -m rlens_jax.harnesses.vlmevalkit FOLDER --plan plan.json -- --data POPE --work-dir runs/kit --judge exact_matching

What stands after -- goes to VLMEvalKit's run.py, which knows the model by NAME. Questions are asked one at a time; the prompts of
benchmarks that `rlens_jax.evaluate` knows are the same as there. docs/harnesses.md has an example, and how to score again what
`rlens_jax.evaluate` predicted.
"""

import importlib.util
import re
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlens_jax.commands.options import (
    add_model_options,
    add_penalty_option,
    check_decoding_options,
    read_plan_options,
    required_model,
)
from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.errors import UserError
from rlens_jax.files import check_local
from rlens_jax.harnesses.backends import BACKENDS, MAX_NEW_TOKENS

NAME = "rlens-plan"
PACKAGED = "vlmeval.run"
"""VLMEvalKit's run.py in its packages on the package index; a checkout has it in its first folder."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_TAKEN = ("Qwen2-VL", "Qwen2.5-VL", "Llama-4")
"""Parts of names for which VLMEvalKit passes options of its own classes."""


def main(arguments: Sequence[str]) -> None:
    """Parse, register the model, run VLMEvalKit."""
    parser = ArgumentParser("python -m rlens_jax.harnesses.vlmevalkit", __doc__)
    add_model_options(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="jax", help="what computes (default: %(default)s)")
    length_help = "max tokens per answer (default: %(default)s)"
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=MAX_NEW_TOKENS, help=length_help)
    add_penalty_option(parser)
    name_help = "the model's name in VLMEvalKit, and so in its files (default: %(default)s)"
    parser.add_argument("--name", default=NAME, help=name_help)
    run_help = "VLMEvalKit's run.py, if it is a checkout and not a package (default: that of the package)"
    parser.add_argument("--run", metavar="FILE", help=run_help)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, theirs = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    model, plan = required_model(parser, options), read_plan_options(parser, options)
    check_decoding_options(parser, options)
    if not _NAME.fullmatch(options.name) or any(part in options.name for part in _TAKEN):
        taken = f"{', '.join(_TAKEN[:-1])} and {_TAKEN[-1]}"
        parser.error(f"--name {options.name!r} must have letters, digits, . _ and - only, and none of {taken}")
    if not theirs:
        parser.error("the options of VLMEvalKit are missing, such as -- --data POPE --judge exact_matching")
    if "--model" in theirs or "--config" in theirs:
        parser.error("after --, neither --model nor --config: the model is this one")
    if options.backend == "torch" and (options.chunk is not None or options.model_shards != 1):
        parser.error("--chunk and --model-shards are options of the back end jax")
    _check_installed(options.run)

    from rlens_jax.checkpoints.checkpoint import read_model_kind
    from rlens_jax.harnesses.backends import open_backend

    kind = read_model_kind(model)
    shaping = {} if options.backend == "torch" else {"chunk": options.chunk, "model_shards": options.model_shards}
    backend = open_backend(options.backend, model, plan, seed=options.seed, dtype=options.dtype, **shaping)

    from vlmeval.config import supported_VLM

    from rlens_jax.harnesses.vlmevalkit_model import PlanModel

    supported_VLM[options.name] = partial(PlanModel, backend, kind, options.max_new_tokens, options.repetition_penalty)
    sys.argv = ["run.py", "--model", options.name, *theirs]
    if options.run is None:
        runpy.run_module(PACKAGED, run_name="__main__")
    else:
        runpy.run_path(options.run, run_name="__main__")


def _check_installed(run: str | None) -> None:
    if run is not None:
        check_local("--run", run)
    if importlib.util.find_spec("vlmeval") is None:
        raise UserError("VLMEvalKit is not installed: install the extra vlmevalkit, or a checkout of it with pip")
    if run is not None and not Path(run).is_file():
        raise UserError(f"--run {run}: no such file")
    if run is None and importlib.util.find_spec(PACKAGED) is None:
        raise UserError("this VLMEvalKit has no run.py in its package: name that of its checkout with --run FILE")


if __name__ == "__main__":
    run_command(main, quiet=False)
