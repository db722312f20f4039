"""A trial of a chat template, which is a program of the checkpoint's author, in a process that may be stopped.

A template is written in a language without side effects, but it can loop for ever or build a text of any length. The trial
writes a long conversation with limits of time, memory and length. Errors of the template are not its concern: they come again
where the template is used.
"""

import json
import subprocess
import sys

from rlens_jax.errors import UserError

SECONDS, BYTES, CHARACTERS = 5, 2 * 2**30, 1_000_000
"""Limits of a trial. A published template takes 0.01 s."""
_PATIENCE = 60
"""Seconds of wall time, with the start of the process."""
_TOO_LONG, _TOO_MUCH, _TOO_SLOW = 3, 4, -24
_REASONS = {
    _TOO_LONG: f"writes more than {CHARACTERS:,} characters",
    _TOO_MUCH: f"takes more than {BYTES / 2**30:.0f} GiB of memory",
    _TOO_SLOW: f"takes longer than {SECONDS} s",
}
_PROGRAM = f"""
import json, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template

used = resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + {SECONDS}
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
resource.setrlimit(resource.RLIMIT_AS, ({BYTES},) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
template, texts = json.load(sys.stdin)
image, text = {{"type": "image"}}, {{"type": "text", "text": texts}}
for content in ([image, text, image, text], texts):
    try:
        turn = [{{"role": "user", "content": content}}]
        written, _ = render_jinja_template(conversations=[turn], chat_template=template, add_generation_prompt=True)
    except MemoryError:
        sys.exit({_TOO_MUCH})
    except Exception:
        continue
    if len(written[0]) > {CHARACTERS}:
        sys.exit({_TOO_LONG})
"""
_TEXT = "What does the page say? " * 400


def try_template(template: str, where: str) -> None:
    """Raise UserError, beginning with `where`, if a chat template takes too much time or memory or writes too much."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps([template, _TEXT]),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        ended = _TOO_SLOW
    if ended:
        reason = _REASONS.get(ended, f"ends Python (exit code {ended})")
        raise UserError(f"{where}: the chat template {reason}; copy the chat template of the published model")
