"""Convert published weights to this package's format, and back.

SRC is a folder with config.json and *.safetensors, or a name on the Hugging Face hub, of which only the needed files are
downloaded. DST, which must not exist yet, becomes a
folder that every command accepts as a model; its conversion.json records the source of each tensor. With --to-hf, SRC is such a
folder and DST gets the safetensors back, bit for bit. Tensors are streamed: the memory needed is twice that of the largest
tensor or layer.
"""

from collections.abc import Sequence

from rlens_jax.commands.options import (
    add_argument_and_option,
    add_model_argument,
    new_folder,
    read_argument_or_option,
    read_model,
)
from rlens_jax.console import ArgumentParser, Progress, run_command, say, show

DTYPES = ("bfloat16", "float16", "float32")
MEGABYTE = 1_000_000


def main(arguments: Sequence[str]) -> None:
    """Parse, convert, print."""
    parser = ArgumentParser("python -m rlens_jax.convert", __doc__)
    add_model_argument(parser, "SRC")
    add_argument_and_option(parser, "DST", "--output", "the folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights (default: keep each tensor's dtype)")
    parser.add_argument("--to-hf", action="store_true", help="turn a converted folder back into safetensors")
    options = parser.parse_args(arguments)
    model, output = read_model(parser, options, "SRC"), read_argument_or_option(parser, options, "DST", "--output")
    if model is None or output is None:
        parser.error(f"{'DST' if model else 'SRC'} is missing")
    if options.to_hf and options.dtype:
        parser.error("--to-hf restores the published tensors; it takes no --dtype")
    import numpy as np

    from rlens_jax.checkpoints import conversion  # also registers the name bfloat16 with NumPy
    from rlens_jax.checkpoints.model_folder import find_source

    source, target = find_source(model), new_folder(output)
    total = conversion.source_bytes(source.folder)
    with Progress("converting", total // MEGABYTE, "MB") as shown:
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            shown.advance((done + num_bytes) // MEGABYTE - done // MEGABYTE)
            done += num_bytes

        if options.to_hf:
            converted = conversion.to_safetensors(source.folder, target, advance)
        else:
            dtype = np.dtype(options.dtype) if options.dtype else None
            converted = conversion.to_orbax(source.folder, target, dtype, advance, name=source.name, revision=source.revision)
    for name, reason in converted.carried.items():
        say(f"copied, but not used by the model: {name} ({reason})")
    show(f"{converted.folder}: {converted.num_tensors} tensors, {converted.num_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was kept")
