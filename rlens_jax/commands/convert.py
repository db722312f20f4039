"""Convert published weights to this package's format, and back.

SRC is a folder with config.json and *.safetensors, or a name on the Hugging Face hub. DST, which must not exist yet, becomes a
folder that every command accepts as a model; its conversion.json records the source of each tensor. With --to-hf, SRC is such a
folder and DST gets the safetensors back, bit for bit. Tensors are streamed: the memory needed is twice that of the largest
tensor or layer.
"""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.console import ArgumentParser, Progress, run_command, say

DTYPES = ("bfloat16", "float16", "float32")
MEGABYTE = 1_000_000


def main(arguments: Sequence[str]) -> None:
    """Parse, convert, print."""
    parser = ArgumentParser("python -m rlens_jax.convert", __doc__)
    parser.add_argument("source", metavar="SRC", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights (default: keep each tensor's dtype)")
    parser.add_argument("--to-hf", action="store_true", help="turn a converted folder back into safetensors")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    options = parser.parse_args(arguments)
    if options.to_hf and options.dtype:
        parser.error("--to-hf restores the published tensors; it takes no --dtype")
    import numpy as np

    from rlens_jax.checkpoints import conversion  # also registers the name bfloat16 with NumPy
    from rlens_jax.checkpoints.checkpoint import find_source

    source = find_source(options.source, options.revision)
    total = conversion.source_bytes(source.folder)
    with Progress("converting", total // MEGABYTE, "MB") as shown:
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            shown.advance((done + num_bytes) // MEGABYTE - done // MEGABYTE)
            done += num_bytes

        if options.to_hf:
            converted = conversion.to_safetensors(source.folder, options.target, advance)
        else:
            dtype = np.dtype(options.dtype) if options.dtype else None
            converted = conversion.to_orbax(
                source.folder, options.target, dtype, advance, name=source.name, revision=source.revision
            )
    for name, reason in converted.carried.items():
        say(f"copied, but not used by the model: {name} ({reason})")
    print(f"{converted.folder}: {converted.num_tensors} tensors, {converted.num_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was kept")
