"""The results of a dry run as tables for the terminal and as JSON, which `dry_run.schema.json` describes."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlens_jax.dry_run.costs import Collective, Cost, ProgramCost, bytes_sent
from rlens_jax.dry_run.dry_run import ASSUMPTIONS, LIKELY_SHARE, DryRun, Estimate, advice, program_time
from rlens_jax.dry_run.program import CompiledProgram, Program
from rlens_jax.dry_run.topology import GIB
from rlens_jax.files import json_text

SCHEMA = "rlens-dry-run/1"
WIDTH = 110
LEGEND = (
    "encode: the vision tower. embed: packs text and visual tokens. layers: runs any consecutive layers. outcome: scores the "
    "teacher-forced answer. generate (search.objective = generation): prefill and decoding."
)
_LINE = "{:<9} {:<26} {:>10} {:>10} {:>8} {:>10} {:>9}  {}"
_WORK = "{:<9} {:<26} {:>10} {:>10} {:>12} {:>12}"


def terminal(result: DryRun) -> str:
    """The tables, the estimate with its assumptions, and the advice."""
    changes = advice(result)
    lines = [*textwrap.wrap(_title(result), WIDTH), "", *_memory(result), "", *_work(result), "", *_layer_collectives(result)]
    lines += ["", *textwrap.wrap(LEGEND, WIDTH), "", *_estimate(result)]
    if changes:
        lines += ["", "The run does not fit. Changes that would help:", *(f"  - {line}" for line in changes)]
    return "\n".join(lines)


def document(result: DryRun) -> str:
    """The text of the JSON file."""
    target, config = result.target, result.config
    return json_text(
        {
            "schema": SCHEMA,
            "fits": result.fits,
            "model": {"path": config.model, "model_type": result.kind.model_type},
            "topology": {
                "name": target.name,
                "chips": target.chips,
                "hosts": target.hosts,
                "devices": target.num_devices,
                "memory_limit_bytes": target.memory_limit,
                "peak_flops_per_second": target.flops,
                "memory_bytes_per_second": target.memory_rate,
                "link_bytes_per_second": target.link_rate,
            },
            "mesh": {"work": result.mesh_shape[0], "model": result.mesh_shape[1]},
            "programs": [_program(program, result) for program in result.programs],
            "workload": {
                "samples": {name: asdict(split) for name, split in result.workload.samples.items()},
                "phases": [asdict(phase) for phase in result.workload.phases],
                "resident_bytes": result.workload.resident_bytes,
            },
            "estimates": [_estimated(estimate) for estimate in result.estimates],
            "assumptions": list(ASSUMPTIONS),
            "advice": advice(result),
            "configuration": config.portable(),
        }
    )


def _title(result: DryRun) -> str:
    config, target, (work, shards) = result.config, result.target, result.mesh_shape
    return (
        f"Dry run of {config.model} in {config.compute.dtype} on {target.name}: chips: {target.chips}, hosts: {target.hosts}, "
        f"mesh: {work} x {shards} (work x model). No program ran: the compiler gives memory and work, and times are computed."
    )


def _memory(result: DryRun) -> Iterator[str]:
    limit = result.target.memory_limit
    yield f"Memory per device in GiB; a program can use {_gib(limit)}; resident: base states, and weights that it does not read"
    yield _LINE.format("program", "bucket", "arguments", "temporary", "output", "resident", "total", "")
    for program in result.programs:
        name, bucket = program.spec.name, program.spec.bucket
        if isinstance(program, CompiledProgram):
            parts = program.memory
            cells = [parts.arguments, parts.temporaries, parts.outputs, parts.resident, parts.total]
            verdict = "fits" if program.fits else "DOES NOT FIT"
            yield _LINE.format(name, bucket, *map(_gib, cells), verdict)
        else:
            needed = "-" if program.needed is None else _gib(program.needed)
            verdict = "DOES NOT FIT" if program.out_of_memory else "NOT COMPILED"
            yield _LINE.format(name, bucket, "", "", "", "", needed, verdict)
            yield from textwrap.wrap(program.reason, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _work(result: DryRun) -> Iterator[str]:
    yield "Work per device, per run of a program and per layer:"
    yield _WORK.format("program", "bucket", "GFLOP", "HBM MB", "sent MB", "roofline ms")
    for program in _compiled(result):
        sent = bytes_sent(program.collectives, dense=True)
        time = program_time(program, result.target)
        name, bucket = program.spec.name, program.spec.bucket
        yield _row(name, bucket, program.dense.total, sent, time.run)
        if program.dense.layer is None or program.reduced.layer is None:
            continue
        for label, dense, cost in (("dense", True, program.dense.layer), ("reduced", False, program.reduced.layer)):
            in_layer = sum(item.link_bytes for item in program.layer_collectives(dense=dense))
            yield _row("", f"  one {label} layer", cost, in_layer, time.layer if dense else None)


def _row(name: str, bucket: str, cost: Cost, sent: float, seconds: float | None) -> str:
    time = "" if seconds is None else f"{seconds * 1e3:,.3f}"
    return _WORK.format(name, bucket, f"{cost.flops / 1e9:,.1f}", f"{cost.bytes / 1e6:,.1f}", f"{sent / 1e6:,.2f}", time)


def _layer_collectives(result: DryRun) -> Iterator[str]:
    yield "Collectives of one layer:"
    for program in _compiled(result):
        if program.dense.layer is None:
            continue
        for label, dense in (("dense", True), ("reduced", False)):
            items = program.layer_collectives(dense=dense)
            text = ", ".join(f"{count} {what}" for what, count in _described(items).items()) or "none"
            head = f"  {program.spec.name} ({program.spec.bucket}), {label}: "
            yield from textwrap.wrap(head + text, WIDTH, subsequent_indent="    ")


def _described(items: Sequence[Collective]) -> Counter[str]:
    return Counter(
        f"{item.kind} of {' and '.join(map(str, item.shapes))} ({item.bytes / 1e6:.2f} MB) over {item.axis}" for item in items
    )


def _estimate(result: DryRun) -> Iterator[str]:
    if not result.estimates:
        yield "No estimate of the run: not every program compiled."
        return
    samples = ", ".join(f"{split.samples} {name} samples ({split.source})" for name, split in result.workload.samples.items())
    yield from textwrap.wrap(f"ESTIMATE of the whole run (not measured), {samples}:", WIDTH)
    for phase in result.workload.phases:
        if phase.evaluations:
            work = f"{phase.steps} batches and {phase.layer_steps} layers per work group"
            yield f"  {phase.name}: {phase.evaluations} plans, {work}"
    for estimate in result.estimates:
        slow = estimate.total / LIKELY_SHARE
        yield (
            f"  {estimate.bucket}: {_minutes(estimate.total)} to {_minutes(slow)} minutes, "
            f"{_short(estimate.chip_hours)} to {_short(estimate.chip_hours / LIKELY_SHARE)} chip-hours"
        )
        parts = ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in estimate.seconds.items())
        yield f"    minutes at the roofline: {parts}"
    yield "  Assumptions:"
    for line in ASSUMPTIONS:
        yield from textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _compiled(result: DryRun) -> Iterator[CompiledProgram]:
    return (program for program in result.programs if isinstance(program, CompiledProgram))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _minutes(seconds: float) -> str:
    return _short(seconds / 60)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _program(program: Program, result: DryRun) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": program.spec.name,
        "bucket": program.spec.bucket,
        "rows": program.spec.rows,
        "layers": program.spec.layers,
        "steps": program.spec.steps,
        "fits": program.fits,
        "compile_seconds": round(program.seconds, 3),
    }
    if not isinstance(program, CompiledProgram):
        return facts | {
            "compiled": False,
            "reason": program.reason,
            "out_of_memory": program.out_of_memory,
            "needed_bytes": program.needed,
        }
    memory = program.memory
    return facts | {
        "compiled": True,
        "memory": {
            "arguments": memory.arguments,
            "temporaries": memory.temporaries,
            "outputs": memory.outputs,
            "kept_aside": memory.resident,
            "total": memory.total,
            "limit": memory.limit,
        },
        "dense": _cost(program.dense),
        "reduced": _cost(program.reduced),
        "xla_counts_loops_once": {"flops": program.xla_flops, "bytes": program.xla_bytes},
        "code_bytes": program.code_bytes,
        "roofline_seconds": program_time(program, result.target).run,
        "collectives": [_collective(item) for item in program.collectives],
    }


def _cost(cost: ProgramCost) -> dict[str, Any]:
    return {"total": asdict(cost.total), "layer": None if cost.layer is None else asdict(cost.layer)}


def _collective(item: Collective) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "shapes": [str(shape) for shape in item.shapes],
        "bytes": item.bytes,
        "link_bytes": item.link_bytes,
        "axis": item.axis,
        "group_size": item.group_size,
        "in_layer_loop": item.in_layer_loop,
        "branch": item.branch,
        "times": item.times,
    }


def _estimated(estimate: Estimate) -> dict[str, Any]:
    return {
        "bucket": estimate.bucket,
        "roofline_seconds": dict(estimate.seconds),
        "minutes": {"roofline": estimate.total / 60, "likely": estimate.total / 60 / LIKELY_SHARE},
        "chip_hours": {"roofline": estimate.chip_hours, "likely": estimate.chip_hours / LIKELY_SHARE},
    }
