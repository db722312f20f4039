"""All checks of `rlens_jax.doctor`, as one JSON object: `doctor.schema.json`."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rlens_jax.config import FfnPath
from rlens_jax.console import say
from rlens_jax.device_checks.ffn_ways import BATCHES, VISUAL_TOKENS, time_ways
from rlens_jax.device_checks.layer_times import LayerTime, LayerTimes, time_settings
from rlens_jax.device_checks.machine import check_cache, check_collectives, describe_devices
from rlens_jax.device_checks.numerics import HEAD_DIM, Check, run_checks
from rlens_jax.engine.timing import TEXT_AFTER, TEXT_BEFORE
from rlens_jax.flops import DecoderSizes
from rlens_jax.ops.attention import Kernel
from rlens_jax.ops.attention_gpu import refusal
from rlens_jax.resources import versions

SCHEMA = "rlens-doctor/1"
DTYPE = "bfloat16"
"""In which an accelerator computes."""


def examine(model: str, sizes: DecoderSizes, visual_tokens: Sequence[int], seconds: float) -> dict[str, Any]:
    """Examine the devices of this process; the layer is timed until `seconds` are over.

    Raises:
        UserError: the devices are of different kinds.
    """
    began, started = time.monotonic(), datetime.now(UTC)
    devices = describe_devices()
    say(f"{devices['count']} x {devices['kind']}: checking fast paths")
    checks = run_checks()
    kernel, fallbacks = _kernel(devices["platform"], checks)
    for line in fallbacks:
        say(line)
    collectives, cache = check_collectives(), check_cache()
    dtype = "float32" if devices["platform"] == "cpu" else DTYPE
    fetched = all(check.passed for check in checks if check.kernel == "fetched ffn")
    path: FfnPath = "auto" if fetched else "gathered"
    # A CPU has no choice.
    ways = time_ways(sizes, VISUAL_TOKENS, BATCHES, dtype, path, began + seconds / 2) if devices["platform"] != "cpu" else []
    tables = time_settings(sizes, visual_tokens, dtype, kernel, path, began + seconds, say)
    return {
        "schema": SCHEMA,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
        "versions": versions(),
        "devices": devices,
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "fallbacks": fallbacks,
        "collectives": [asdict(each) for each in collectives],
        "cache": asdict(cache),
        "ffn_ways": [asdict(each) for each in ways],
        "layer": {"model": model, "text_tokens": TEXT_BEFORE + TEXT_AFTER, "tables": [_table(each) for each in tables]},
    }


def failures(report: dict[str, Any], *, strict: bool) -> list[str]:
    """What failed, in words; a kernel that has a path of plain XLA in its place counts only if `strict`."""
    failed = [each["name"] for each in report["checks"] if not each["passed"] and (strict or each["kernel"] is None)]
    failed += [f"collective {each['name']}" for each in report["collectives"] if not each["right"]]
    return failed if report["cache"]["written"] and report["cache"]["read"] else [*failed, "compilation cache"]


def _kernel(platform: str, checks: Sequence[Check]) -> tuple[Kernel, list[str]]:
    """The attention kernel to time, and a line for each kernel that failed."""
    failed = {check.kernel: check for check in checks if check.kernel is not None and not check.passed}
    lines = [
        f"the kernel {name} fails ({check.error or f'{check.name}: off by {check.difference:.1e}'}); plain XLA takes its place"
        for name, check in failed.items()
    ]
    if platform == "gpu" and (why := refusal(DTYPE, HEAD_DIM)) is not None:
        lines.append(f"attention by plain XLA, not by cuDNN: {why}")
        return "packed", lines
    own: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn"}
    kernel = own.get(platform, "packed")
    return (kernel if kernel not in failed else "packed"), lines


def _table(table: LayerTimes) -> dict[str, Any]:
    return {**asdict(table), "times": [_row(each, table.times[0]) for each in table.times]}


def _row(timed: LayerTime, dense: LayerTime) -> dict[str, Any]:
    flops_saved, time_saved = 1 - timed.flops / dense.flops, 1 - timed.seconds / dense.seconds
    return {
        "setting": timed.setting,
        "wall_seconds": [turn.wall for turn in timed.turns],
        "cpu_seconds": [turn.cpu for turn in timed.turns],
        "deciding_seconds": timed.seconds,
        "flops": timed.flops,
        "predicted": timed.predicted,
        "flops_saved": flops_saved,
        "time_saved": time_saved,
        "realised_saving": time_saved / flops_saved if flops_saved else None,
    }
