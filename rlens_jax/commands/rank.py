"""Rank the decoder layers of a multimodal LLM by how little they need full visual computation.

Without options: the embedded model on its own data, a few minutes on two CPU cores. On several hosts, start the same command on
each. With --dry-run TOPOLOGY nothing runs: the run's programs are compiled for a TPU slice, on a machine without one.

Exit codes: 0 done; 2 bad input; 130 after Ctrl-C and 143 after SIGTERM (resumable); 75 if a process of several was lost
(resumable); 1 an error in this program.
"""

import math
from collections.abc import Sequence

from rlens_jax.commands.options import RunParser, add_restart_option, new_file, traces_folder
from rlens_jax.console import run_command, show
from rlens_jax.dry_run.process import Job, run_job
from rlens_jax.dry_run.topology import find_slice
from rlens_jax.errors import UserError
from rlens_jax.files import quoted, replace_file
from rlens_jax.hosts.cluster import is_distributed
from rlens_jax.hosts.supervisor import supervised


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print."""
    parser = RunParser("python -m rlens_jax.rank", "[--model FOLDER] [--data FILE.jsonl] [--output DIR]", __doc__)
    add_restart_option(parser)
    parser.add_argument(
        "--profile", metavar="DIR", nargs="?", const="", type=traces_folder, help="write profile.json, and traces to DIR if given"
    )
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run",
        metavar="TOPOLOGY",
        help="compile the run's programs for a TPU slice such as v5e:16x16 and report whether they fit, what they cost and how "
        "long the run would take; needs only config.json in the model's folder",
    )
    group.add_argument("--json", metavar="FILE", type=new_file, help="also write the results of the dry run to this file")
    group.add_argument("--all-buckets", action="store_true", help="compile for all bucket sizes, not only for two")
    group.add_argument("--within", metavar="MINUTES", type=_minutes, help="also say what to change for the run to take less time")
    options, config = parser.parse_run(arguments)
    if options.dry_run is not None:
        if options.profile is not None:
            parser.error("--profile needs a run, not a dry run")
        target = find_slice(options.dry_run)
        text, document = run_job(Job(config, target, options.all_buckets, options.within))
        if options.json is not None:
            replace_file(options.json, document.encode())
        show(text)
        return
    only_dry = {"--json": options.json, "--all-buckets": options.all_buckets or None, "--within": options.within}
    if lonely := [name for name, value in only_dry.items() if value is not None]:
        parser.error(f"{lonely[0]} needs --dry-run TOPOLOGY")
    if is_distributed(config.hosts):
        supervised(config.folder)
    from rlens_jax.hosts.processes import joined
    from rlens_jax.ranking.ranking_run import rank
    from rlens_jax.reporting.front_report import front_summary
    from rlens_jax.reporting.report_text import summary
    from rlens_jax.search.results import Results

    with joined(config.hosts) as processes:
        results = rank(config, processes, restart=options.restart, profile=options.profile)
        if processes.leads:
            show(summary(results, config.folder))
            if isinstance(results, Results) and results.front is not None:
                show("\n" + front_summary(results.front, config.folder))


def _minutes(text: str) -> float:
    """A number of minutes. UserError if it is none above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise UserError(f"--within must be a number of minutes above 0, not {quoted(text)}")
    return minutes


if __name__ == "__main__":
    run_command(main)
