"""Measures the time and memory of a Python process from outside; a part of other benchmarks."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SAMPLING_SECONDS = 0.01


def measured(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, int, str]:
    """Run `python ARGUMENTS`; returns its seconds, the peak of its anonymous and shared memory in bytes, and its output."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(SAMPLING_SECONDS)
    seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"python {' '.join(arguments)[:80]} failed with exit code {process.returncode}")
    assert process.stdout is not None
    return seconds, peak, process.stdout.read()


def memory_of(pid: int) -> int:
    """Anonymous and shared resident memory of a process, in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
