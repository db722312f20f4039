"""Prove that this package computes the same model as another framework.

MODEL is a folder (published or converted), "embedded" or a name on the Hugging Face hub. Choose one of
  MODEL --reference BUNDLE   compare logits with those of another framework, case by case; exit code 0 if all are within the
                             tolerance, 1 if not. rlens_jax/parity/bundle.py describes the format of bundles.
  MODEL --dump BUNDLE        write such a bundle with Hugging Face's PyTorch model (extra `torch`), dense and reduced.
  --rankings A B             compare two layer rankings: a ranking.json, a list such as 27,26,25, or a file with a list.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rlens_jax.commands.options import (
    add_dtype_option,
    add_json_option,
    add_model_argument,
    add_plan_options,
    input_folder,
    new_file,
    new_folder,
    read_model,
    read_plan_options,
)
from rlens_jax.console import ArgumentParser, Progress, run_command, show
from rlens_jax.errors import UserError
from rlens_jax.files import replace_file
from rlens_jax.plans import Plan, Reduction

USES = {
    "reference": {"json", "markdown", "tolerance", "dtype"},
    "dump": {"plan", "first", "attention", "ffn", "attention_range", "active_fraction", "probe_fraction", "no_states"},
    "rankings": {"json", "markdown", "layers"},
}
"""The further options of each choice."""


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print."""
    parser = ArgumentParser("python -m rlens_jax.validate", __doc__)
    add_model_argument(parser)
    parser.add_argument("--reference", metavar="BUNDLE", type=input_folder, help="compare with this bundle")
    parser.add_argument("--dump", metavar="BUNDLE", type=new_folder, help="write this bundle")
    parser.add_argument("--rankings", metavar=("A", "B"), nargs=2, help="compare two rankings")
    add_json_option(parser)
    parser.add_argument("--markdown", metavar="FILE", type=new_file, help="also write a report to this file")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative to max(1, largest logit) (default: %(default)s)")
    add_dtype_option(parser, "float32", "float32")
    add_plan_options(parser, pruning=False)
    parser.add_argument("--layers", metavar="N", type=int, help="--rankings: number of layers of the model")
    for name, operator in (("attention", "Hollow Attention"), ("ffn", "the Dynamic FFN")):
        text = f"--dump: layers with {operator} (default: the later half)"
        parser.add_argument(f"--{name}", metavar="LIST", type=_layers, help=text)
    text = "--dump: see rlens_jax.rank (default: %(default)s)"
    for name in ("attention_range", "active_fraction", "probe_fraction"):
        default = getattr(Reduction(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="X", type=type(default), default=default, help=text)
    parser.add_argument("--no-states", action="store_true", help="--dump: write no hidden states")
    options = parser.parse_args(arguments)
    options.model = read_model(parser, options)
    chosen = [name for name in ("reference", "dump", "rankings") if getattr(options, name) is not None]
    if len(chosen) != 1:
        parser.error("choose one of --reference BUNDLE, --dump BUNDLE and --rankings A B")
    if (options.model is None) != (chosen == ["rankings"]):
        parser.error("--rankings takes no MODEL" if options.model else f"--{chosen[0]} needs a MODEL")
    for name in sorted(set().union(*USES.values()) - USES[chosen[0]]):
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no meaning with --{chosen[0]}")
    if options.dump is not None:
        _dump(options, _plans(parser, options))
    elif options.reference is not None:
        _reference(options)
    else:
        _rankings(options)


def _layers(text: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{text!r} is not a list of layers such as 20,21")
    return tuple(map(int, numbers))


def _plans(parser: ArgumentParser, options: Namespace) -> tuple[list[Plan], Reduction]:
    """The plans to dump, and how they reduce: of --plan, or of the options."""
    from rlens_jax.checkpoints.checkpoint import read_model_kind

    kind = read_model_kind(options.model)
    decoder = kind.config.decoder
    num_layers = decoder.num_layers
    if options.plan is not None:
        for name in sorted(USES["dump"] - {"plan", "first", "no_states"}):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--plan and --{name.replace('_', '-')} contradict each other; the plan file has all settings")
        plan = read_plan_options(parser, options)
        plan.validate(decoder, kind.model_type)
        if plan.pruning is not None:
            parser.error(f"{options.plan} prunes tokens, which bundles do not have")
        if plan.plan.freeze_text_before:
            parser.error(f"{options.plan} holds the text of whole layers, and bundles compare half layers; leave that out")
        return list(dict.fromkeys([Plan(), plan.plan])), plan.reduction
    later = tuple(range(num_layers // 2, num_layers))
    attention = later if options.attention is None else options.attention
    ffn = later if options.ffn is None else options.ffn
    plans = [Plan(), Plan(attention, ()), Plan((), ffn), Plan(attention, ffn)]
    return list(dict.fromkeys(plans)), Reduction(options.attention_range, options.active_fraction, options.probe_fraction)


def _reference(options: Namespace) -> None:
    from rlens_jax.parity import parity_report as report
    from rlens_jax.parity.comparison import validate

    validation = validate(options.model, options.reference, options.dtype, options.tolerance)
    _write(options.json, report.validation_json(validation))
    _write(options.markdown, report.validation_markdown(validation))
    show(report.validation_text(validation))
    if not validation.within_tolerance:
        sys.exit(1)


def _dump(options: Namespace, reduced: tuple[list[Plan], Reduction]) -> None:
    from rlens_jax.parity.dump import dump

    plans, reduction = reduced
    with Progress("running PyTorch", len(plans), "cases") as shown:
        folder = dump(options.model, options.dump, plans, reduction, not options.no_states, shown.advance)
    show(f"{folder}: {len(plans)} cases")


def _rankings(options: Namespace) -> None:
    from rlens_jax.parity import parity_report as report
    from rlens_jax.parity.rankings import compare_rankings

    a, b = options.rankings
    comparisons = compare_rankings(a, b, options.layers)
    _write(options.json, report.rankings_json(comparisons))
    _write(options.markdown, report.rankings_markdown(comparisons))
    show(report.rankings_text(comparisons))


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        replace_file(path, text.encode())


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was kept")
