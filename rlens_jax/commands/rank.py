"""Rank the decoder layers of a multimodal LLM: `python -m rlens_jax.rank [--model FOLDER] [--data FILE.jsonl] [--output DIR]`.

Without options: the embedded model on its own data, a few minutes on two CPU cores. See `--help` for every field.
With `--dry-run v5e:16x16` nothing runs: the run's programs are compiled for a TPU slice (`rlens_jax.dry_run`).

On several hosts the same command is started on each. Exit codes: 0 done; 2 bad input; 130 after Ctrl-C and 143 after
SIGTERM, resumable; 75 when a process of several was lost, resumable; 1 a mistake of ours.
"""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.config import load_config
from rlens_jax.console import run_command
from rlens_jax.dry_run.process import Job, run_job
from rlens_jax.dry_run.request import OPTIONS, take_request
from rlens_jax.files import replace_file
from rlens_jax.hosts.cluster import several
from rlens_jax.hosts.supervisor import supervised


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print."""
    request, left = take_request(arguments)
    config = load_config(left, OPTIONS)
    if request is not None:
        text, document = run_job(Job(config, request.target, request.all_buckets))
        if request.json_file is not None:
            replace_file(request.json_file, document.encode())
        print(text)
        return
    if several(config.hosts):
        supervised(Path(config.output))
    from rlens_jax.hosts.processes import joined
    from rlens_jax.ranking.ranking_run import run
    from rlens_jax.reporting.terminal import summary

    with joined(config.hosts) as processes:
        results = run(config, processes)
        if processes.leads:
            print(summary(results, Path(config.output)))


if __name__ == "__main__":
    run_command(main)
