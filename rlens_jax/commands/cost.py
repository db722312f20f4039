"""Count what a prefill costs, dense and reduced.

MODEL is a folder, "embedded" or a name on the Hugging Face hub, of which only config.json is read, or a published model by its
short name: internvl2-8b, qwen2-vl-7b, minicpm-v-2.6, llava-onevision-7b, qwen2-vl-2b, llava-onevision-0.5b, qwen2.5-vl-7b,
qwen2.5-vl-3b, qwen3-vl-8b, qwen3-vl-4b, internvl3.5-8b, internvl3.5-4b, internvl3.5-1b, llava-1.5-7b, llava-1.5-13b,
llava-next-vicuna-7b, llava-next-mistral-7b. Token pruning comes from the plan, or from --pruning, --fastv, --vtw or --folder.
The numbers are multiply-adds of the decoder layers by the usual convention (rlens_jax/flops.py), without and with the probes.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from rlens_jax.commands.options import (
    SHORT_NAME,
    add_json_option,
    add_model_argument,
    add_plan_options,
    find_decoder,
    read_plan_options,
    required_model,
)
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.errors import UserError
from rlens_jax.files import json_text, replace_file
from rlens_jax.flops import prefill_summary
from rlens_jax.pruning import VTW, FastV, Folder, Pruning


def main(arguments: Sequence[str]) -> None:
    """Parse, count, print."""
    parser = ArgumentParser("python -m rlens_jax.cost", __doc__)
    add_model_argument(parser, kinds=SHORT_NAME)
    parser.add_argument("--text", metavar="N", type=int, default=64, help="text tokens (default: %(default)s)")
    parser.add_argument("--visual", metavar="N", type=int, default=1792, help="visual tokens (default: %(default)s)")
    add_plan_options(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--fastv", metavar=("K", "SHARE"), nargs=2, help="drop SHARE of the visual tokens after K layers")
    group.add_argument("--vtw", metavar="K", type=int, help="drop all visual tokens after K layers")
    group.add_argument("--folder", metavar="SHARE", help="merge SHARE of the visual tokens away before the first layer")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    model = required_model(parser, options)
    if min(options.text, options.visual) < 0 or options.text + options.visual == 0:
        parser.error("--text and --visual must be numbers of tokens, not both 0")
    plan = read_plan_options(parser, options)
    pruning = _pruning(options)
    if pruning is not None:
        if plan.pruning is not None:
            parser.error(f"{options.plan} prunes already: {plan.pruning.label()}")
        plan = replace(plan, pruning=pruning)
    decoder = find_decoder(model)
    num_layers, sizes = decoder.num_layers, decoder.layer_sizes
    plan.validate(decoder)  # by sizes: nothing else changes a cost
    summary = prefill_summary(sizes, num_layers, options.text, options.visual, plan.plan, plan.reduction, plan.pruning)
    if options.json:
        replace_file(options.json, json_text(summary).encode())
    show(f"{model}: {num_layers} layers, {options.text} text and {options.visual} visual tokens")
    show(f"plan: {plan.label()}")
    show(f"{'dense':<22}{summary['dense']:12.4g} multiply-adds")
    for name in ("without_probes", "with_probes"):
        part = summary[name]
        label = f"reduced, {name.replace('_', ' ')}"
        show(f"{label:<22}{part['reduced']:12.4g} multiply-adds, {part['share_of_dense']:.1%} of dense")
    if plan.pruning is not None:
        if summary["selection"] is None:
            show("choosing tokens takes attention in the vision tower in addition, which rlens_jax.evaluate counts")
        else:
            show(f"{'choosing tokens':<22}{summary['selection']:12.4g} multiply-adds in addition")
        kept, mean = summary["visual_tokens_in_layer"][-1], summary["mean_visual_tokens"]
        show(f"{kept} visual tokens kept, {mean:.2f} in a layer on average")


def _pruning(options: Namespace) -> Pruning | None:
    if options.fastv is not None:
        layer, share = options.fastv
        if not layer.isdecimal():
            raise UserError(f"--fastv: K must be a number of layers, not {layer!r}")
        return FastV(int(layer), share)
    if options.vtw is not None:
        return VTW(options.vtw)
    return None if options.folder is None else Folder(options.folder)


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
