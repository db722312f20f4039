"""Rank the decoder layers of a multimodal LLM: `python -m rlens_jax.rank [--model FOLDER] [--data FILE.jsonl] [--output DIR]`.

Without options: the embedded model on its own data, a few minutes on two CPU cores. See `--help` for every field.
"""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.config import load_config
from rlens_jax.console import run_command


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print."""
    config = load_config(arguments)
    from rlens_jax.report.terminal import summary
    from rlens_jax.run import run

    print(summary(run(config), Path(config.output)))


if __name__ == "__main__":
    run_command(main)
