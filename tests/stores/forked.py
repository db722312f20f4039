"""Runs commands in children of a process that has imported all they need, which takes longer than the small runs of the tests.

Reads one JSON list per line from stdin: the file for stderr, the name of a command, its arguments. Prints the child's number and,
at its end, its exit code, negative for a signal. No device is used before the fork.
"""

import importlib
import json
import os
import sys

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.console import run_command
from rlens_jax.resources import embedded_model

for name in ("gcsfs", "rlens_jax.evaluation.evaluation_run", "rlens_jax.ranking.ranking_run", "rlens_jax.checkpoints.conversion"):
    importlib.import_module(name)
read_model_kind(embedded_model()).preparer(embedded_model())  # imports the processors of transformers
names = ("convert", "evaluate", "rank", "report")
mains = {name: importlib.import_module(f"rlens_jax.commands.{name}").main for name in names}

for line in sys.stdin:
    errors, command, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            run_command(mains[command], argv=arguments)
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            importlib.import_module("traceback").print_exc()
            os._exit(1)
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
