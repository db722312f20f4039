"""One process of a run of several, started as rank.py, with toy work: `python member.py CASE --output DIR ...`."""

import os
import sys
import time
from pathlib import Path

from rlens_jax.commands.options import RunParser
from rlens_jax.console import Progress, run_command, say
from rlens_jax.errors import UserError
from rlens_jax.hosts.cluster import is_distributed
from rlens_jax.hosts.supervisor import supervised
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Journal, Record

STEPS = 2000
IDENTITY = {"toy": 1}


def main(arguments):
    case, *options = arguments
    _, config = RunParser("member.py", "", "").parse_run(options)
    output = Path(config.output)
    if is_distributed(config.hosts):
        supervised(output)
    from rlens_jax.hosts.processes import joined

    print("pid", os.getpid(), file=sys.stderr)
    with joined(config.hosts) as processes:
        CASES[case](config, processes, output)


def agreements(config, processes, output):
    """Every check on which processes can disagree; each prints the result or the error. The last check ends them."""

    def report(check):
        try:
            print("fine:", check(), file=sys.stderr)
        except UserError as error:
            print("refused:", error, file=sys.stderr)

    model = Path(config.model)

    def find():
        if not model.exists():
            raise UserError(f"{model}: no such folder")
        return model.name

    def never():
        raise UserError("bad everywhere")

    report(lambda: processes.gather(["é", processes.index]))
    report(lambda: processes.check_same({"seed": config.seed, "search": {"penalty": config.search.penalty}}))
    report(lambda: processes.check_same(config.portable()))
    report(lambda: processes.agreed(find))
    report(lambda: processes.agreed(never))
    report(lambda: processes.check_shared(output))
    report(lambda: processes.check_shared(Path(config.data.cache)))
    report(lambda: processes.check_shared(Path(__file__)))
    report(lambda: processes.in_order(lambda: "first", lambda: "second"))
    report(lambda: processes.in_order(never, lambda: "second"))
    say("spoken once")
    with Progress("toy", 1, "steps") as shown:
        shown.advance()
    processes.agreed(never)


def ranking(config, processes, output):
    """Evaluations that need all processes, each in the journal, until the end or a signal."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    from rlens_jax.hosts.processes import Stopper

    processes.check_same(config.portable())
    processes.check_shared(output)
    journal = processes.in_order(lambda: Journal.open(output, IDENTITY), lambda: Journal.follow(output, IDENTITY))
    done = processes.gather(journal.num_outcomes)
    say(f"resumed {done}, {jax.device_count()} devices")
    stopper = Stopper()
    with journal, Progress("toy", STEPS, "steps") as shown:
        for step in range(done[0], STEPS):
            everywhere = np.sum(process_allgather(np.int32(step))) / processes.count
            journal.append(Record("toy", Plan((step,)), [0], [float(everywhere)], 0.0))
            shown.advance()
            stopper.check()
            if step == 5 and processes.index == config.seed - 100:
                raise UserError("the disk of this one is full")
            time.sleep(0.02)


CASES = {"agreements": agreements, "ranking": ranking}

if __name__ == "__main__":
    run_command(main)
