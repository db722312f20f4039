"""What a dry run found out: a table for the terminal, and `dry_run.schema.json`'s JSON for programs."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlens_jax.config import RunConfig, portable
from rlens_jax.dry_run.advice import advice
from rlens_jax.dry_run.analysis import DryRun
from rlens_jax.dry_run.collectives import Collective
from rlens_jax.dry_run.costs import Cost, ProgramCost
from rlens_jax.dry_run.program import CompiledProgram, Program, of_one_layer
from rlens_jax.dry_run.roofline import ASSUMPTIONS, LIKELY_SHARE, Estimate, program_time
from rlens_jax.dry_run.topology import GIB
from rlens_jax.families.registry import ModelKind
from rlens_jax.files import json_text

SCHEMA = "rlens-dry-run/1"
WIDTH = 110
LEGEND = (
    "encode: vision tower; embed: packing; layers: base pass and suffix evaluation, one program; outcome: teacher-forced answer; "
    "generate (search.objective = generation): prefill and decoding steps."
)
_LINE = "{:<9} {:<26} {:>10} {:>10} {:>8} {:>10} {:>9}  {}"
_WORK = "{:<9} {:<26} {:>10} {:>10} {:>12} {:>12}"


def terminal(found: DryRun, config: RunConfig, kind: ModelKind) -> str:
    """The tables, the estimate, what it rests on, and what to change when the run does not fit."""
    changes = advice(found, config, kind.config.decoder.sizes)
    lines = [
        *textwrap.wrap(_title(found, config), WIDTH),
        "",
        *_memory(found),
        "",
        *_work(found),
        "",
        *_layer_collectives(found),
    ]
    lines += ["", *textwrap.wrap(LEGEND, WIDTH), "", *_estimate(found)]
    if changes:
        lines += ["", "It does not fit. What would help:", *(f"  - {line}" for line in changes)]
    return "\n".join(lines)


def document(found: DryRun, config: RunConfig, kind: ModelKind) -> str:
    """The text of the JSON file."""
    where = found.where
    return json_text(
        {
            "schema": SCHEMA,
            "fits": found.fits,
            "model": {"path": config.model, "model_type": kind.model_type},
            "topology": {
                "name": where.name,
                "chips": where.chips,
                "hosts": where.hosts,
                "devices": where.num_devices,
                "memory_limit_bytes": where.memory_limit,
                "peak_flops_per_second": where.flops,
                "memory_bytes_per_second": where.memory_rate,
                "link_bytes_per_second": where.link_rate,
            },
            "mesh": {"work": found.mesh_shape[0], "model": found.mesh_shape[1]},
            "programs": [_program(program, found) for program in found.programs],
            "workload": {
                "samples": {name: asdict(split) for name, split in found.workload.samples.items()},
                "phases": [asdict(phase) for phase in found.workload.phases],
                "resident_bytes": found.workload.resident_bytes,
            },
            "estimates": [_estimated(estimate) for estimate in found.estimates],
            "assumptions": list(ASSUMPTIONS),
            "advice": advice(found, config, kind.config.decoder.sizes),
            "configuration": portable(config),
        }
    )


def _title(found: DryRun, config: RunConfig) -> str:
    where, (work, shards) = found.where, found.mesh_shape
    return (
        f"Dry run of {config.model} in {config.compute.dtype} on {where.name}: chips: {where.chips}, hosts: {where.hosts}, "
        f"mesh: {work} x {shards} (work x model). Nothing ran: programs were compiled, all else is arithmetic."
    )


def _memory(found: DryRun) -> Iterator[str]:
    limit = found.where.memory_limit
    yield f"Memory of one device in GiB, of which a program can use {_gib(limit)}; kept aside are other weights and base states:"
    yield _LINE.format("program", "bucket", "arguments", "temporary", "output", "kept aside", "total", "")
    for program in found.programs:
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


def _work(found: DryRun) -> Iterator[str]:
    yield "Work of one device in one run of a program, and in one layer of it:"
    yield _WORK.format("program", "bucket", "GFLOP", "HBM MB", "sent MB", "roofline ms")
    for program in _compiled(found):
        sent = _sent(program.collectives, dense=True)
        time = program_time(program, found.where)
        name, bucket = program.spec.name, program.spec.bucket
        yield _row(name, bucket, program.dense.total, sent, time.run)
        if program.dense.layer is None or program.reduced.layer is None:
            continue
        for label, dense, cost in (
            ("dense", True, program.dense.layer),
            ("reduced", False, program.reduced.layer),
        ):
            in_layer = sum(item.link_bytes for item in of_one_layer(program.collectives, dense=dense))
            yield _row("", f"  one {label} layer", cost, in_layer, time.layer if dense else None)


def _row(name: str, bucket: str, cost: Cost, sent: float, seconds: float | None) -> str:
    time = "" if seconds is None else f"{seconds * 1e3:,.3f}"
    return _WORK.format(
        name, bucket, f"{cost.flops / 1e9:,.1f}", f"{cost.bytes / 1e6:,.1f}", f"{sent / 1e6:,.2f}", time
    )


def _layer_collectives(found: DryRun) -> Iterator[str]:
    yield "Collectives of one layer:"
    for program in _compiled(found):
        if program.dense.layer is None:
            continue
        for label, dense in (("dense", True), ("reduced", False)):
            items = of_one_layer(program.collectives, dense=dense)
            text = ", ".join(f"{count} {what}" for what, count in _described(items).items()) or "none"
            head = f"  {program.spec.name} ({program.spec.bucket}), {label}: "
            yield from textwrap.wrap(head + text, WIDTH, subsequent_indent="    ")


def _described(items: Sequence[Collective]) -> Counter[str]:
    return Counter(
        f"{item.kind} of {' and '.join(map(str, item.shapes))} ({item.bytes / 1e6:.2f} MB) over {item.axis}"
        for item in items
    )


def _estimate(found: DryRun) -> Iterator[str]:
    if not found.estimates:
        yield "No estimate of the run, since not every program compiled."
        return
    samples = ", ".join(
        f"{split.samples} {name} samples ({split.source})" for name, split in found.workload.samples.items()
    )
    yield from textwrap.wrap(f"ESTIMATE of the whole run, not measured, {samples}:", WIDTH)
    for phase in found.workload.phases:
        if phase.evaluations:
            yield (
                f"  {phase.name}: {phase.evaluations} plans, {phase.steps} batches through "
                f"{phase.layer_steps} layers a work group"
            )
    for estimate in found.estimates:
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


def _compiled(found: DryRun) -> Iterator[CompiledProgram]:
    return (program for program in found.programs if isinstance(program, CompiledProgram))


def _sent(collectives: Sequence[Collective], *, dense: bool) -> float:
    return sum(
        item.link_bytes * item.times for item in collectives if not item.branch or item.branch.startswith("0") == dense
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _minutes(seconds: float) -> str:
    return _short(seconds / 60)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _program(program: Program, found: DryRun) -> dict[str, Any]:
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
        "roofline_seconds": program_time(program, found.where).run,
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
