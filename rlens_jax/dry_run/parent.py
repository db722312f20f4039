"""A dry run in a process of its own: the compiler's noise goes to a file that is looked at only when it dies.

libtpu reads its environment when it is loaded, logs from C++ straight to the terminal, and ends a process that displeases it; so
the process that a person started never loads it. The other one answers in lines of JSON over a pipe.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rlens_jax.config import load_config
from rlens_jax.console import say
from rlens_jax.dry_run.request import Request, take_request
from rlens_jax.dry_run.topology import require_compiler
from rlens_jax.errors import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""There is no TPU to look for, and two dry runs may compile at the same time."""

ANSWERS = "RLENS_JAX_ANSWERS"
"""Environment variable with the number of the file descriptor that answers go to."""


def run_dry(request: Request, arguments: Sequence[str]) -> str:
    """What a dry run of these arguments prints; its JSON is written where the request says.

    Raises:
        UserError: bad input, no libtpu, or the compiler died.
    """
    require_compiler()
    answer = _answer_of_child(arguments)
    if request.json_file is not None:
        try:
            request.json_file.write_text(answer["json"])
        except OSError as error:
            raise UserError(f"--json {request.json_file}: cannot be written ({error.strerror})") from None
    return str(answer["text"])


def _answer_of_child(arguments: Sequence[str]) -> Mapping[str, Any]:
    read, write = os.pipe()
    command = [sys.executable, "-m", "rlens_jax.dry_run.child", *arguments]
    environment = {**os.environ, **ENVIRONMENT, ANSWERS: str(write)}
    with tempfile.TemporaryFile() as noise:
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, pass_fds=[write]
        ) as child:
            os.close(write)
            try:
                with open(read) as answers:
                    for answer in map(json.loads, answers):
                        if "progress" in answer:
                            say(answer["progress"])
                        else:
                            return _checked(answer)
            finally:
                child.kill()  # it may sit in the compiler, deaf to less
        raise UserError(_death(child.returncode, noise))


def _checked(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in answer:
        raise UserError(answer["error"])
    if "traceback" in answer:
        raise RuntimeError(answer["traceback"])
    return answer


def _death(code: int, noise: IO[bytes]) -> str:
    """Why a process ended without an answer, as far as its last words tell."""
    noise.seek(0)
    lines = [line.strip() for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # The compiler complains of missing hosts whenever it starts; only what is fatal tells.
    fatal = [line for line in lines if "Check failed" in line or "Fatal" in line or line.startswith("F0")]
    died = f"the compiler for TPUs died ({how})"
    if fatal:
        return f"{died}: {fatal[-1][:300]}"
    return f"{died}: most likely this machine has too little memory" if code == -signal.SIGKILL else died


def answer(arguments: Sequence[str]) -> None:
    """The other process: compile, and answer over the pipe."""
    with open(int(os.environ[ANSWERS]), "w") as pipe:

        def send(**fields: Any) -> None:
            print(json.dumps(fields), file=pipe, flush=True)

        try:
            request, left = take_request(arguments)
            config = load_config(left)
            if request is None:
                raise UserError("only `rlens_jax.rank --dry-run` starts this process")
            # Only now, with all input looked at, since it takes seconds.
            from rlens_jax.dry_run.whole_run import dry_run_of

            text, document = dry_run_of(config, request, lambda line: send(progress=line))
            send(text=text, json=document)
        except UserError as error:
            send(error=str(error))
        except Exception:
            send(traceback=traceback.format_exc())
