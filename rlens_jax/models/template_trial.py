"""A trial of a chat template, which is a program of the checkpoint's author, in a process that may be stopped.

A template is written in a language without side effects, but it can loop for ever or build a text of any length. The trial
writes a long conversation with limits of time, memory and length. Other errors of a template come again where it is used.
"""

import json
import signal
import subprocess
import sys
from functools import cache

from rlens_jax.errors import UserError

SECONDS, BYTES, CHARACTERS = 3, 2 * 2**30, 1_000_000
"""Limits of a trial. A published template takes 0.01 s."""
_PATIENCE = 60
"""Seconds of wall time, with the start of the process."""
_TEXT = "What does the page say? " * 400
_PROGRAM = f"""
import json, resource, sys
from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

used = resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + {SECONDS}
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
if sys.platform == "linux":
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + {BYTES},) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
template, texts = json.load(sys.stdin)
image, text = {{"type": "image"}}, {{"type": "text", "text": texts}}
system, answer = {{"role": "system", "content": [text]}}, {{"role": "assistant", "content": [text]}}
question = {{"role": "user", "content": [image, text, image, text]}}
for turn in ([question], [{{"role": "user", "content": texts}}], [system, question, answer, question]):
    try:
        written, _ = render_jinja_template(conversations=[turn], chat_template=template, add_generation_prompt=True)
    except MemoryError:
        sys.exit("takes more than {BYTES / 2**30:.0f} GiB of memory")
    except TemplateSyntaxError as error:
        sys.exit(f"has an error in line {{error.lineno}} ({{error.message}})")
    except Exception:
        continue
    if len(written[0]) > {CHARACTERS}:
        sys.exit("writes more than {CHARACTERS:,} characters")
"""


def try_template(template: str, where: str) -> None:
    """Raise UserError, beginning with `where`, if a chat template has a syntax error, or takes or writes too much."""
    if reason := _trial(template):
        raise UserError(f"{where}: the chat template {reason}; copy the chat template of the published model")


@cache
def _trial(template: str) -> str:
    """What is wrong with a template, or nothing."""
    command = [sys.executable, "-P", "-c", _PROGRAM]
    too_slow = f"takes longer than {SECONDS} s"
    try:
        ended = subprocess.run(
            command, input=json.dumps([template, _TEXT]), capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return too_slow
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return too_slow
    lines = ended.stderr.splitlines() or [f"ends Python (exit code {ended.returncode})"]
    return lines[-1] if ended.returncode else ""
