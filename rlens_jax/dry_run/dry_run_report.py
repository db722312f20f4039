"""The results of a dry run as tables for the terminal and as JSON, which `dry_run.schema.json` describes."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rlens_jax.dry_run.advice import to_finish, to_fit
from rlens_jax.dry_run.costs import LAYER_KINDS, Collective, Cost, LayerKind, ProgramCost, bytes_sent
from rlens_jax.dry_run.dry_run import DryRun
from rlens_jax.dry_run.estimate import COMPILED_TOGETHER, LIKELY_SHARE, Estimate, program_time
from rlens_jax.dry_run.program import CompiledProgram, Program, image_bucket, row_bucket
from rlens_jax.dry_run.topology import GIB
from rlens_jax.dry_run.workload import Phase
from rlens_jax.engine.sizes import ASSUMED_PLACES
from rlens_jax.files import json_text
from rlens_jax.forecast import RACED_SHARE

SCHEMA = "rlens-dry-run/2"
WIDTH = 110
LEGEND = (
    "encode: the vision tower. embed: packs text and visual tokens. layers: runs any consecutive layers. last layer: "
    "at the answers alone. outcome: scores the teacher-forced answer. generate (search.objective = generation): prefill and "
    "decoding."
)
_LINE = "{:<9} {:<26} {:>10} {:>10} {:>8} {:>10} {:>9}  {}"
_WORK = "{:<9} {:<26} {:>10} {:>10} {:>12} {:>12}"
_BUCKET = "  {:<26} {:>6} {:>6} {:>7} {:>6}  {}"

ASSUMPTIONS = (
    "Compiled are the bucket with most work and the largest one; others are scaled by their slots from the nearer of them. "
    "--all-buckets compiles all.",
    f"Programs are compiled for rows with {ASSUMED_PLACES.branches} branch and {ASSUMED_PLACES.answers} answer tokens: more of "
    "them add little to a row's work.",
    "The later layer wins every round of the search: no order costs more. Held-out plans form chains, each starting where it "
    "differs from the plan before; none is stopped early.",
    f"Early stopping leaves {RACED_SHARE:.0%} of the layers of a round, as replayed on finished searches of the embedded model; "
    "another model and other data have another share.",
    "Chips reach their published peak rates in bfloat16; the extra passes of float32 products are not counted. An all-reduce in "
    "a copy of the model uses the links between its chips, without those that wrap around the torus.",
    f"At {LIKELY_SHARE:.0%} of these rates the devices take {1 / LIKELY_SHARE:g} times as long. This share is a guess, not a "
    "measurement.",
    "Only matrix products count as arithmetic. A Pallas kernel counts as its CostEstimate declares; splash attention counts "
    "the blocks that its mask visits, its inputs and its outputs.",
    f"Collectives do not overlap with other work. A host traces one program after another and compiles {COMPILED_TOGETHER} at a "
    "time, with this machine's CPU time for each. Reading data, preparing images on the hosts and timing are not counted.",
)


def terminal(result: DryRun, within: float | None) -> str:
    """The tables, the estimate with its assumptions, and the advice; `within` is the time that the run may take, in minutes."""
    changes = to_fit(result)
    lines = [*textwrap.wrap(_title(result), WIDTH), "", *_memory(result), "", *_work(result), "", *_layer_collectives(result)]
    lines += ["", *textwrap.wrap(LEGEND, WIDTH), "", *_estimate(result)]
    if changes:
        lines += ["", "The run does not fit. Changes that would help:", *(f"  - {line}" for line in changes)]
    if within is not None and result.estimate is not None:
        lines += ["", *_within(result, result.estimate, within)]
    return "\n".join(lines)


def document(result: DryRun, within: float | None) -> str:
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
                "link_bytes_per_second": asdict(result.links),
            },
            "mesh": {"work": result.mesh_shape[0], "model": result.mesh_shape[1]},
            "programs": [_program(program, result) for program in result.programs],
            "workload": _workload(result),
            "estimate": None if result.estimate is None else _estimated(result.estimate),
            "assumptions": [*result.data.notes, *ASSUMPTIONS],
            "advice": [*to_fit(result), *([] if within is None else to_finish(result, within))],
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
    yield "Work per device, per run of a program and per layer, by what is reduced in it:"
    yield _WORK.format("program", "bucket", "GFLOP", "HBM MB", "sent MB", "roofline ms")
    for program in _compiled(result):
        time = program_time(program, result.target, result.links)
        sent = bytes_sent(program.collectives, "dense")
        yield _row(program.spec.name, program.spec.bucket, program.costs["dense"].total, sent, time.run)
        for kind in LAYER_KINDS:
            cost = program.costs[kind].layer
            if cost is not None:
                in_layer = sum(item.link_bytes for item in program.layer_collectives(kind))
                yield _row("", f"  one layer, {_REDUCED[kind]}", cost, in_layer, time.layer[kind])


_REDUCED: dict[LayerKind, str] = {"dense": "dense", "attention": "hollow", "ffn": "dynamic", "both": "both"}


def _row(name: str, bucket: str, cost: Cost, sent: float, seconds: float) -> str:
    cells = [f"{cost.flops / 1e9:,.1f}", f"{cost.bytes / 1e6:,.1f}", f"{sent / 1e6:,.2f}", f"{seconds * 1e3:,.3f}"]
    return _WORK.format(name, bucket, *cells)


def _layer_collectives(result: DryRun) -> Iterator[str]:
    yield "Collectives of one layer:"
    kinds: tuple[LayerKind, ...] = ("dense", "both")
    for program in _compiled(result):
        if program.costs["dense"].layer is None:
            continue
        for kind in kinds:
            items = program.layer_collectives(kind)
            text = ", ".join(f"{count} {what}" for what, count in _described(items).items()) or "none"
            head = f"  {program.spec.name} ({program.spec.bucket}), {'dense' if kind == 'dense' else 'reduced'}: "
            yield from textwrap.wrap(head + text, WIDTH, subsequent_indent="    ")


def _described(items: Sequence[Collective]) -> Counter[str]:
    return Counter(
        f"{item.kind} of {' and '.join(map(str, item.shapes))} ({item.bytes / 1e6:.2f} MB) over {item.axis}" for item in items
    )


def _estimate(result: DryRun) -> Iterator[str]:
    if result.estimate is None:
        yield "No estimate of the run: not every program compiled."
        return
    found = result.estimate
    yield from textwrap.wrap(f"ESTIMATE of the whole run (not measured). Sizes of rows and images: {result.data.source}.", WIDTH)
    yield f"  {_minutes(found.roofline)} minutes at the roofline, of which:"
    for name, buckets in found.phases.items():
        yield f"    {name}: {_minutes(sum(buckets.values()))}"
    hours, compiling = _short(found.likely / 3600 * found.chips), _minutes(found.compilation)
    share = f"{LIKELY_SHARE:.0%} of these rates"
    yield f"  {_minutes(found.likely)} minutes ({hours} chip-hours) at {share}, {compiling} of them to compile"
    yield "  Minutes at the roofline by bucket (rows and their blocks in each split):"
    yield from _buckets(result, found)
    yield "  What decides the time:"
    for line in factors(result):
        yield from textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    yield "  Assumptions:"
    for line in (*result.data.notes, *ASSUMPTIONS):
        yield from textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _buckets(result: DryRun, found: Estimate) -> Iterator[str]:
    yield _BUCKET.format("bucket", "rows", "blocks", "a block", "full", "minutes")
    compiled = {program.spec.bucket for program in result.programs}
    work = result.workload
    for bucket in _by_bucket(found):
        loads = [load for split in work.splits.values() for load in split.buckets if row_bucket(load.bucket) == bucket]
        minutes = _minutes(sum(buckets.get(bucket, 0.0) for buckets in found.phases.values()))
        note = minutes if bucket in compiled else f"{minutes} (scaled)"
        if not loads:
            yield _BUCKET.format(bucket, "", "", "", "", note)
            continue
        full = sum(load.tokens for load in loads) / (work.groups * sum(load.slots for load in loads))
        rows, blocks = ("+".join(str(getattr(load, name)) for load in loads) for name in ("rows", "blocks"))
        yield _BUCKET.format(bucket, rows, blocks, loads[0].block_rows, f"{full:.0%}", note)


def _by_bucket(found: Estimate) -> list[str]:
    return list(dict.fromkeys(bucket for buckets in found.phases.values() for bucket in buckets))


def factors(result: DryRun) -> list[str]:
    """What makes the run faster or slower, each with its number."""
    work = result.workload
    samples, branches, rows = (
        sum(getattr(split, name) for split in work.splits.values()) for name in ("samples", "branches", "rows")
    )
    alone, tokens = result.data.tokens_alone, sum(load.tokens for split in work.splits.values() for load in split.buckets)
    lines = [
        f"sharing: {branches} prompts with answers of {samples} samples are {rows} rows; tokens {tokens:,} instead of {alone:,} "
        f"({tokens / alone:.2f})",
        f"fill: {work.fill:.0%} of the slots of {work.groups} work groups hold tokens",
    ]
    lines += [f"{phase.name}: {_layers(phase)}" for phase in work.phases]
    group, ring = result.mesh_shape[1], result.links.model / 1e9
    return [*lines, f"links: {group} devices of a copy of the model send {ring:.3g} GB/s each"]


def _layers(phase: Phase) -> str:
    run, states = sum(phase.layers.values()), sum(phase.state_layers.values())
    if not run:
        return f"{phase.evaluations} plans, {phase.steps:.0f} runs per block"
    reduced = 1 - (phase.layers["dense"] + phase.state_layers["dense"]) / (run + states)
    return (
        f"{phase.evaluations} plans; {run:,.0f} layers per block and {states:.0f} for base states, where all layers of all plans "
        f"are {phase.from_first:,} ({(run + states) / phase.from_first:.2f}); {reduced:.0%} of them are reduced"
    )


def _within(result: DryRun, found: Estimate, minutes: float) -> Iterator[str]:
    if found.likely <= 60 * minutes:
        yield f"The run takes less than {minutes:g} minutes by this estimate."
        return
    yield f"The run takes more than {minutes:g} minutes by this estimate. Minutes after a change:"
    yield from (f"  - {line}" for line in to_finish(result, minutes))


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
        "costs": {kind: _cost(program.costs[kind]) for kind in LAYER_KINDS},
        "xla_counts_loops_once": {"flops": program.xla_flops, "bytes": program.xla_bytes},
        "code_bytes": program.code_bytes,
        "roofline_seconds": program_time(program, result.target, result.links).run,
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
        "branches": list(map(str, item.branches)),
        "times": item.times,
    }


def _workload(result: DryRun) -> dict[str, Any]:
    work = result.workload
    splits: dict[str, Any] = {}
    for name, split in work.splits.items():
        splits[name] = {
            "samples": split.samples,
            "branches": split.branches,
            "rows": split.rows,
            "buckets": [
                {
                    "text": load.bucket.text,
                    "visual": load.bucket.visual,
                    "rows": load.rows,
                    "tokens": load.tokens,
                    "block_rows": load.block_rows,
                    "blocks": load.blocks,
                }
                for load in split.buckets
            ],
            "images_per_group": {image_bucket(size): count for size, count in split.images.items()},
        }
    return {
        "source": result.data.source,
        "splits": splits,
        "fill": work.fill,
        "phases": [asdict(phase) for phase in work.phases],
        "factors": factors(result),
        "resident_bytes": work.resident_bytes,
    }


def _estimated(found: Estimate) -> dict[str, Any]:
    return {
        "roofline_seconds": {name: dict(buckets) for name, buckets in found.phases.items()},
        "compilation_seconds": found.compilation,
        "minutes": {"roofline": found.roofline / 60, "likely": found.likely / 60},
        "chip_hours": found.likely / 3600 * found.chips,
    }
