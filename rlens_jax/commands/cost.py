"""What a prefill costs, dense and reduced: `python -m rlens_jax.cost MODEL --text 64 --visual 1792 [--plan PLAN]`.

MODEL is a folder or "embedded", of which only config.json is read, or one of the models of the paper by name: internvl2-8b,
qwen2-vl-7b, minicpm-v-2.6, llava-onevision-7b, qwen2-vl-2b, llava-onevision-0.5b. PLAN is a plan file, or a ranking.json with
--first. Token pruning is counted if PLAN has any, or by --fastv, --vtw or --folder. Multiply-adds of the decoder layers by the
field's convention (rlens_jax/flops.py), without and with the probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.errors import UserError, suggest
from rlens_jax.files import json_text
from rlens_jax.flops import LayerSizes, prefill_cost, visual_in_layer
from rlens_jax.plan import Plan
from rlens_jax.plan_file import PlanFile, add_plan_options, plan_of
from rlens_jax.pruning import VTW, FastV, Folder, Pruning


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
    parser.add_argument("--text", metavar="N", type=int, default=64, help="text tokens (default: %(default)s)")
    parser.add_argument("--visual", metavar="N", type=int, default=1792, help="visual tokens (default: %(default)s)")
    add_plan_options(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--fastv", metavar=("K", "SHARE"), nargs=2, help="drop SHARE of the visual tokens after K layers"
    )
    group.add_argument("--vtw", metavar="K", type=int, help="drop all visual tokens after K layers")
    group.add_argument("--folder", metavar="SHARE", help="merge SHARE of the visual tokens away before the first layer")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if min(options.text, options.visual) < 0 or options.text + options.visual == 0:
        parser.error("--text and --visual must be numbers of tokens, not both 0")
    plan = plan_of(options.plan, options.first, parser.error)
    pruning = _pruning(options.fastv, options.vtw, options.folder)
    if pruning is not None:
        if plan.pruning is not None:
            parser.error(f"{options.plan} prunes already: {plan.pruning.label()}")
        plan = replace(plan, pruning=pruning)
    stack = find_stack(options.model)
    plan.validate(stack.num_layers)
    counted = count(stack, options.text, options.visual, plan)
    if options.json:
        try:
            options.json.write_text(json_text(counted), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{options.json}: cannot be written ({error.strerror})") from None
    print(f"{options.model}: {stack.num_layers} layers, {options.text} text and {options.visual} visual tokens")
    print(f"plan: {plan.label()}")
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
    from rlens_jax.checkpoints.checkpoint import EMBEDDED, read_model_kind

    if model != EMBEDDED and not Path(model).exists():
        known = (*MODELS, EMBEDDED)
        raise UserError(f"{model}: neither a folder nor one of {', '.join(known)}{suggest(model, known)}")
    decoder = read_model_kind(model).config.decoder
    sizes = LayerSizes(decoder.width, decoder.num_kv_heads * decoder.head_dim, decoder.ffn_width)
    return Stack(decoder.num_layers, sizes)


def _pruning(fastv: Sequence[str] | None, vtw: int | None, folder: str | None) -> Pruning | None:
    if fastv is not None:
        layer, share = fastv
        if not layer.isdecimal():
            raise UserError(f"--fastv: K must be a number of layers, not {layer!r}")
        return FastV(int(layer), share)
    if vtw is not None:
        return VTW(vtw)
    return None if folder is None else Folder(folder)


def count(stack: Stack, num_text: int, num_visual: int, plan: PlanFile) -> dict[str, Any]:
    """Multiply-adds as the JSON file has them: of the dense prefill, and of the reduced one without and with probes."""
    visual = visual_in_layer(plan.pruning, num_visual, stack.num_layers)

    def cost(visual: Sequence[int], given: Plan, with_probes: bool) -> int:
        return prefill_cost(stack.sizes, num_text, visual, given, plan.reduction, with_probes=with_probes)

    dense = cost([num_visual] * stack.num_layers, Plan(), False)
    counted: dict[str, Any] = {
        "schema": "rlens-cost/1",
        "num_layers": stack.num_layers,
        "text_tokens": num_text,
        "visual_tokens_in_layer": visual,
        "dense": dense,
    }
    for name, with_probes in (("without_probes", False), ("with_probes", True)):
        reduced = cost(visual, plan.plan, with_probes)
        counted[name] = {"reduced": reduced, "share_of_dense": reduced / dense}
    return counted


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
