"""Ask a model about images, and print the answer.

MODEL is a folder (published or converted), "embedded" or a name on the Hugging Face hub. PLAN says which layers are reduced
(rlens_jax/plan_file.py): a JSON file written by hand, or a ranking.json together with --first. The images come before TEXT; with
--marks, each goes to its "<image>" in TEXT.

From Python:

    model = rlens_jax.load(MODEL)
    plan = rlens_jax.read_plan(PLAN)
    text = model.generate(images=[FILE], prompt=TEXT, plan=plan)
"""

from collections.abc import Sequence

from rlens_jax.commands.options import (
    add_asking_options,
    add_decoding_options,
    add_model_options,
    check_decoding_options,
    given_limits,
    input_file,
    read_plan_options,
    required_model,
)
from rlens_jax.console import ArgumentParser, run_command, say, show


def main(arguments: Sequence[str]) -> None:
    """Parse, generate, print."""
    parser = ArgumentParser("python -m rlens_jax.generate", __doc__)
    add_model_options(parser)
    parser.add_argument("--image", metavar="FILE", type=input_file, nargs="+", default=[], help="the images, in order")
    parser.add_argument("--prompt", metavar="TEXT", help="the question")
    parser.add_argument("--marks", action="store_true", help='each "<image>" in TEXT is the place of an image, not text')
    turn_help = (
        "an earlier turn of the conversation; repeat for further ones. Images come first, or at the marks of all questions"
    )
    parser.add_argument("--turn", metavar=("QUESTION", "ANSWER"), nargs=2, action="append", default=[], help=turn_help)
    add_asking_options(parser)
    add_decoding_options(parser, "128")
    options = parser.parse_args(arguments)
    model = required_model(parser, options)
    if options.prompt is None:
        parser.error("--prompt TEXT is missing")
    check_decoding_options(parser, options)
    plan = read_plan_options(parser, options)

    import jax

    from rlens_jax.checkpoints.checkpoint import read_model_kind
    from rlens_jax.engine.choices import chosen_dtype, dtype_line
    from rlens_jax.engine.deployed_model import load, make_sample
    from rlens_jax.engine.startup import start_jax

    # Checks that need no weights come first.
    make_sample("the prompt", options.image, options.prompt, options.marks, options.system, options.turn)
    kind = read_model_kind(model)
    plan.validate(kind.config.decoder, kind.model_type)
    kind.check_pruning(plan.pruning)
    start_jax()
    loaded = load(
        model,
        dtype=options.dtype,
        chunk=options.chunk,
        model_shards=options.model_shards,
        seed=options.seed,
        limits=given_limits(options),
        plan=plan,
    )
    say(f"settings for {model}: {dtype_line(options.dtype, chosen_dtype(options.dtype, jax.default_backend()))}")
    answer = loaded.generate(
        options.image,
        options.prompt,
        plan,
        turns=options.turn,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        marks=options.marks,
        system=options.system,
    )
    show(answer)


if __name__ == "__main__":
    run_command(main, interrupted="interrupted")
