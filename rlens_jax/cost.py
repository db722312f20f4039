"""What a prefill costs, dense and reduced: `python -m rlens_jax.cost MODEL --text 64 --visual 1792 [--plan PLAN]`.

MODEL is a folder or "embedded", of which only config.json is read, or one of the models of the paper by name: internvl2-8b,
qwen2-vl-7b, minicpm-v-2.6, llava-onevision-7b, qwen2-vl-2b, llava-onevision-0.5b. PLAN is a plan file, or a ranking.json with
--first. Token pruning counts with --prune-after K --drop SHARE: so many of the visual tokens are missing from layer K on (FastV;
with a share of 1, VTW). Multiply-adds of the decoder layers by the field's convention (rlens_jax/flops.py), without and with the
probes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.errors import UserError, suggest
from rlens_jax.flops import LayerSizes, prefill_cost
from rlens_jax.plan import Plan
from rlens_jax.plan_file import PlanFile, parse_first, read_plan


@dataclass(frozen=True)
class Stack:
    """Equal layers of a decoder."""

    num_layers: int
    sizes: LayerSizes


_QWEN2_7B = Stack(28, LayerSizes(3584, 512, 18944))
MODELS = {
    "internvl2-8b": Stack(32, LayerSizes(4096, 1024, 14336)),
    "qwen2-vl-7b": _QWEN2_7B,
    "minicpm-v-2.6": _QWEN2_7B,
    "llava-onevision-7b": _QWEN2_7B,
    "qwen2-vl-2b": Stack(28, LayerSizes(1536, 256, 8960)),
    "llava-onevision-0.5b": Stack(24, LayerSizes(896, 128, 4864)),
}
"""The paper's models, and two small ones of the same families."""


def main(arguments: Sequence[str]) -> None:
    """Parse, count, print."""
    parser = ArgumentParser(prog="python -m rlens_jax.cost", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model folder, or a name")
    parser.add_argument(
        "--text", metavar="N", type=int, default=64, help="text tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--visual", metavar="N", type=int, default=1792, help="visual tokens (default: %(default)s)"
    )
    parser.add_argument("--plan", metavar="PLAN", type=Path, help="which layers are reduced; default: none")
    parser.add_argument(
        "--first", metavar="LIST", help="of a ranking.json: how many layers, as attention=11,ffn=5"
    )
    parser.add_argument("--prune-after", metavar="K", type=int, help="layers that see all visual tokens")
    parser.add_argument(
        "--drop", metavar="SHARE", help="share of the visual tokens missing from layer K on, as 0.3"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.first is not None and options.plan is None:
        parser.error("--first needs a --plan that is a ranking.json")
    if (options.prune_after is None) != (options.drop is None):
        parser.error("--prune-after and --drop go together")
    if min(options.text, options.visual) < 0 or options.text + options.visual == 0:
        parser.error("--text and --visual must be numbers of tokens, not both 0")
    first = None if options.first is None else parse_first(options.first)
    plan = PlanFile() if options.plan is None else read_plan(options.plan, first)
    stack = find_stack(options.model)
    plan.validate(stack.num_layers)
    visual = [options.visual] * stack.num_layers
    if options.drop is not None:
        visual = pruned(visual, options.prune_after, options.drop)
    counted = count(stack, options.text, visual, plan)
    if options.json:
        try:
            options.json.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{options.json}: cannot be written ({error.strerror})") from None
    print(
        f"{options.model}: {stack.num_layers} layers, {options.text} text and {options.visual} visual tokens"
    )
    if options.drop is not None:
        print(f"visual tokens from layer {options.prune_after} on: {visual[-1]}")
    print(f"plan: {plan.plan.label()}")
    print(f"{'dense':<22}{counted['dense']:12.4g} multiply-adds")
    for name in ("without_probes", "with_probes"):
        part = counted[name]
        label = f"reduced, {name.replace('_', ' ')}"
        print(f"{label:<22}{part['reduced']:12.4g} multiply-adds, {part['share_of_dense']:.1%} of dense")


def find_stack(model: str) -> Stack:
    """The layers of a named model, or of the one whose config.json is in a folder. UserError when there is neither."""
    if model in MODELS:
        return MODELS[model]
    # Imported here: a named model needs no JAX.
    from rlens_jax.weights.checkpoint import EMBEDDED, read_model_kind

    if model != EMBEDDED and not Path(model).exists():
        known = (*MODELS, EMBEDDED)
        raise UserError(f"{model}: neither a folder nor one of {', '.join(known)}{suggest(model, known)}")
    decoder = read_model_kind(model).config.decoder
    sizes = LayerSizes(decoder.width, decoder.num_kv_heads * decoder.head_dim, decoder.ffn_width)
    return Stack(decoder.num_layers, sizes)


def pruned(visual: Sequence[int], after: int, share: str) -> list[int]:
    """Visual tokens in each layer when the exact decimal `share` of them, to the nearest whole number, is missing from layer
    `after` on.

    Raises:
        UserError: no such layer, or no such share.
    """
    try:
        dropped = Fraction(Decimal(share))
    except (InvalidOperation, ValueError, OverflowError):
        dropped = Fraction(-1)
    if not 0 < dropped <= 1:
        raise UserError(f"--drop must be a share above 0 and at most 1, such as 0.3, not {share}")
    if not 0 <= after < len(visual):
        raise UserError(f"--prune-after must be a layer of the model, 0-{len(visual) - 1}, not {after}")
    kept = int(visual[0] * (1 - dropped) + Fraction(1, 2))
    return [*visual[:after], *[kept] * (len(visual) - after)]


def count(stack: Stack, num_text: int, visual_in_layer: Sequence[int], plan: PlanFile) -> dict[str, Any]:
    """Multiply-adds as the JSON file has them: of the dense prefill, and of the reduced one without and with probes."""
    unpruned = [visual_in_layer[0]] * stack.num_layers
    dense = prefill_cost(stack.sizes, num_text, unpruned, Plan(), plan.reduction, with_probes=False)
    counted: dict[str, Any] = {
        "schema": "rlens-cost/1",
        "num_layers": stack.num_layers,
        "text_tokens": num_text,
        "visual_tokens_in_layer": list(visual_in_layer),
        "dense": dense,
    }
    for name, with_probes in (("without_probes", False), ("with_probes", True)):
        reduced = prefill_cost(
            stack.sizes, num_text, visual_in_layer, plan.plan, plan.reduction, with_probes=with_probes
        )
        counted[name] = {"reduced": reduced, "share_of_dense": reduced / dense}
    return counted


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
