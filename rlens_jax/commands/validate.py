"""Prove that this is the same model: `python -m rlens_jax.validate MODEL --reference BUNDLE [--json FILE] [--markdown FILE]`.

MODEL is a folder (published or converted) or "embedded". Three things can be done:
  MODEL --reference BUNDLE   compare our logits with those of another framework, case by case; exit code 0 when all are within
                             tolerance, 1 when not. The format of bundles is described in rlens_jax/parity/bundle.py.
  MODEL --dump BUNDLE        make such a bundle with Hugging Face's PyTorch model (extra torch), dense and reduced.
  --rankings A B             compare two layer rankings: a ranking.json, a list such as 27,26,25, or a file with a list.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlens_jax.config import DTYPES
from rlens_jax.console import ArgumentParser, Progress, run_command
from rlens_jax.errors import UserError
from rlens_jax.plan import Plan, Reduction

TOLERANCE = 1e-4


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print."""
    parser = ArgumentParser(prog="python -m rlens_jax.validate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", help='a model folder, or "embedded"')
    parser.add_argument("--reference", metavar="BUNDLE", type=Path, help="compare with this bundle")
    parser.add_argument("--dump", metavar="BUNDLE", type=Path, help="make this bundle")
    parser.add_argument("--rankings", metavar=("A", "B"), nargs=2, help="compare two rankings")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--markdown", type=Path, help="also write a report to this file")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative to max(1, largest logit)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of our weights and computation")
    parser.add_argument("--layers", type=int, help="--rankings: number of layers of the model")
    parser.add_argument("--attention", type=_layers, help="--dump: layers to reduce (default: the later half)")
    parser.add_argument("--ffn", type=_layers, help="--dump: likewise for the FFN")
    for name in ("attention_range", "active_fraction", "probe_fraction"):
        default = getattr(Reduction(), name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help="--dump: see rlens_jax.rank")
    parser.add_argument("--no-states", action="store_true", help="--dump: write no hidden states")
    options = parser.parse_args(arguments)
    chosen = [name for name in ("reference", "dump", "rankings") if getattr(options, name) is not None]
    if len(chosen) != 1:
        parser.error("say one of --reference BUNDLE, --dump BUNDLE and --rankings A B")
    if (options.model is None) != (chosen == ["rankings"]):
        parser.error("--rankings takes no MODEL" if options.model else f"--{chosen[0]} needs a MODEL")
    {"reference": _reference, "dump": _dump, "rankings": _rankings}[chosen[0]](options)


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _reference(options: Any) -> None:
    from rlens_jax.parity import parity_report as report
    from rlens_jax.parity.validation import validate

    validation = validate(options.model, options.reference, options.dtype, options.tolerance)
    _write(options.json, lambda: report.validation_json(validation))
    _write(options.markdown, lambda: report.validation_markdown(validation))
    print(report.validation_text(validation))
    if not validation.within_tolerance:
        sys.exit(1)


def _dump(options: Any) -> None:
    from rlens_jax.checkpoints.checkpoint import read_model_kind
    from rlens_jax.parity.dump import dump

    num_layers = read_model_kind(options.model).config.decoder.num_layers
    later = tuple(range(num_layers // 2, num_layers))
    attention = later if options.attention is None else options.attention
    ffn = later if options.ffn is None else options.ffn
    plans = list(dict.fromkeys([Plan(), Plan(attention, ()), Plan((), ffn), Plan(attention, ffn)]))
    reduction = Reduction(options.attention_range, options.active_fraction, options.probe_fraction)
    with Progress("running PyTorch", len(plans), "cases") as shown:
        folder = dump(options.model, options.dump, plans, reduction, not options.no_states, shown.advance)
    print(f"{folder}: {len(plans)} cases")


def _rankings(options: Any) -> None:
    from rlens_jax.parity import parity_report as report
    from rlens_jax.parity.rankings import compare_rankings

    a, b = options.rankings
    comparisons = compare_rankings(a, b, options.layers)
    _write(options.json, lambda: report.rankings_json(comparisons))
    _write(options.markdown, lambda: report.rankings_markdown(comparisons))
    print(report.rankings_text(comparisons))


def _write(path: Path | None, text: Any) -> None:
    if path is None:
        return
    try:
        path.write_text(text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was kept")
