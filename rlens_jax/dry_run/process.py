"""Runs a dry run in a child process, so that libtpu is never loaded into the process that a user started.

libtpu reads its environment when it is loaded, logs from C++ straight to the terminal, and ends its process after some errors.
The child reads its job from stdin and answers in lines of JSON over a pipe; its other output is read only if it dies.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from rlens_jax.config import RunConfig
from rlens_jax.console import say
from rlens_jax.dry_run.topology import Slice, require_compiler
from rlens_jax.errors import UserError

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Compile without a TPU, even while other processes do the same."""

ANSWERS = "RLENS_JAX_ANSWERS"
"""Environment variable with the file descriptor of the pipe for answers."""


@dataclass(frozen=True)
class Job:
    """A dry run to do: arguments as of `dry_run.dry_run`."""

    config: RunConfig
    target: Slice
    all_buckets: bool
    within: float | None = None
    """Minutes that the run may take."""


def run_job(job: Job) -> tuple[str, str]:
    """Do a dry run in a child process; returns its text for the terminal and its JSON.

    Raises:
        UserError: bad input, no libtpu, or the compiler died.
    """
    require_compiler()
    read, write = os.pipe()
    environment = {**os.environ, **ENVIRONMENT, ANSWERS: str(write)}
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as output:
        pickle.dump(job, stdin)
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "rlens_jax.dry_run.process"],
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=[write],
        ) as child:
            os.close(write)
            try:
                with open(read) as answers:
                    for answer in map(json.loads, answers):
                        if "progress" in answer:
                            say(answer["progress"])
                        else:
                            return _texts(answer)
            finally:
                child.kill()  # inside the compiler it ignores gentler signals
        raise UserError(_death(child.returncode, output))


def _texts(answer: Mapping[str, Any]) -> tuple[str, str]:
    if "error" in answer:
        raise UserError(answer["error"])
    if "traceback" in answer:
        raise RuntimeError(answer["traceback"])
    return answer["text"], answer["json"]


def _death(code: int, output: IO[bytes]) -> str:
    """Explain why the child ended without an answer."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # libtpu complains about missing hosts at every start; only fatal lines say why it died.
    fatal = [line for line in lines if "Check failed" in line or "Fatal" in line or line.startswith("F0")]
    died = f"the compiler for TPUs died ({how})"
    if fatal:
        return f"{died}: {fatal[-1][:300]}"
    return f"{died}: this machine probably has too little memory" if code == -signal.SIGKILL else died


def do_job() -> None:
    """The child: compile, and answer over the pipe."""
    with open(int(os.environ[ANSWERS]), "w") as pipe:

        def send(**fields: str) -> None:
            print(json.dumps(fields), file=pipe, flush=True)

        try:
            job: Job = pickle.load(sys.stdin.buffer)
            # In the child only: importing JAX takes seconds.
            from rlens_jax.dry_run.dry_run import dry_run
            from rlens_jax.dry_run.dry_run_report import document, terminal

            result = dry_run(job.config, job.target, all_buckets=job.all_buckets, progress=lambda line: send(progress=line))
            send(text=terminal(result, job.within), json=document(result, job.within))
        except UserError as error:
            send(error=str(error))
        except Exception:
            send(traceback=traceback.format_exc())


if __name__ == "__main__":
    do_job()
