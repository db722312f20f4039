"""Find the best plan under a budget: which layers are reduced, in which operator and how far.

`--budget loss=1%` saves as much of the prefill's time as it can while the loss stays within 1 %; `flops=60%` and `time=0.7` lose
as little as they can while this share of the dense prefill is left. The search is joint over layers, operators and levels, by
loss per cost saved. Time is measured: once per pair of levels on this device, and for the plans that are compared. A budget of
loss is confirmed on held-out samples, with one-sided 95 % confidence; if it cannot be, the dense model is published.

The output folder gets plan.json (a plan file), front.json (score against measured prefill time; schema:
rlens_jax/search/front.schema.json), front.png, front.svg, report.html, level_times.json, and the journal from which an
interrupted run resumes.
"""

from collections.abc import Sequence

from rlens_jax.commands.options import RunParser, add_restart_option
from rlens_jax.console import run_command, show
from rlens_jax.hosts.cluster import is_distributed
from rlens_jax.hosts.supervisor import supervised


def main(arguments: Sequence[str]) -> None:
    """Parse, search, print."""
    usage = "--budget BUDGET [--model FOLDER] [--data FILE.jsonl] [--output DIR]"
    parser = RunParser("python -m rlens_jax.plan", usage, __doc__, preset="plan", output="runs/plan")
    add_restart_option(parser)
    options, config = parser.parse_run(arguments)
    if config.joint.budget is None:
        parser.error("--budget is missing: name what the plan may cost, such as loss=1%, flops=60% or time=0.7")
    if is_distributed(config.hosts):
        supervised(config.folder)
    from rlens_jax.hosts.processes import joined
    from rlens_jax.planning.plan_run import make_plan
    from rlens_jax.reporting.front_report import front_summary

    with joined(config.hosts) as processes:
        front = make_plan(config, processes, restart=options.restart)
        if processes.leads:
            show(front_summary(front, config.folder))


if __name__ == "__main__":
    run_command(main)
