"""What to change in a configuration: so that it fits into memory, or takes less time."""

from collections.abc import Iterator
from dataclasses import replace

from rlens_jax.config import RunConfig
from rlens_jax.dry_run.dry_run import DryRun
from rlens_jax.dry_run.program import CompiledProgram, Program
from rlens_jax.dry_run.topology import find_slice


def to_fit(result: DryRun) -> list[str]:
    """Changes to the configuration that need less memory, each with the field's name; empty if everything fits."""
    devices, sizes = result.target.num_devices, result.kind.config.decoder.sizes
    # Larger sizes of the mesh's `model` axis that divide both the devices and the model.
    shards = [
        n
        for n in range(result.mesh_shape[1] + 1, devices + 1)
        if not (devices % n or sizes["N"] % n or sizes["F"] % n) and (sizes["K"] % n == 0 or n % sizes["K"] == 0)
    ]
    lines = (line for program in result.programs if not program.fits for line in _to_fit(program, result.config, shards))
    return list(dict.fromkeys(lines))


def _to_fit(program: Program, config: RunConfig, shards: list[int]) -> list[str]:
    name, lines = program.spec.name, []
    if isinstance(program, CompiledProgram):
        excess = program.memory.total - program.memory.limit
        if excess <= program.memory.resident and config.compute.state_memory_gb:
            lines.append(f"compute.state_memory_gb: lower it by {excess / 1e9:.1f} or more")
    elif not program.out_of_memory:
        return [f"{name}: the compiler failed for another reason than memory, see above"]
    if config.compute.dtype == "float32":
        lines.append("compute.dtype: bfloat16 needs half of the memory")
    if shards:
        lines.append(f"compute.model_shards: {' or '.join(map(str, shards))}, to place less of the model on each device")
    if config.compute.batch_size > 1:
        lines.append(f"compute.batch_size: below {config.compute.batch_size}")
    if name == "encode":
        lines.append("compute.patch_slots: lower the largest size, and limit image sizes in preprocessor_config.json to it")
    else:
        lines.append("compute.visual_slots and compute.text_slots: lower the largest size")
    return lines


def to_finish(result: DryRun, minutes: float) -> list[str]:
    """Changes that take less time, with the minutes that the run takes then; those that suffice come first.

    Empty if the run takes at most `minutes`, or has no estimate.
    """
    if result.estimate is None or result.estimate.likely <= 60 * minutes:
        return []
    found = sorted((seconds / 60, text) for text, seconds in _changes(result) if seconds < result.estimate.likely)
    return [f"{text}: {time:.3g} minutes{'' if time <= minutes else ', not enough alone'}" for time, text in found]


def _changes(result: DryRun) -> Iterator[tuple[str, float]]:
    """Each change, and the likely seconds of the run with it."""
    config, layers = result.config, result.kind.config.decoder.num_layers
    search, report = config.search, config.report
    for name in result.target.kind.shapes:
        larger = find_slice(f"{result.target.kind.name}:{name}")
        times = larger.chips // result.target.chips
        if times in (2, 4):
            yield f"--dry-run {larger.name}, {times} times as many chips", result.changed(config, slices=times)
    for share, text in ((0.5, "half"), (0.25, "a quarter")):
        yield f"{text} of the samples (data.validation_samples, data.test_samples)", result.changed(config, share=share)
    if report.random_rankings:
        yield "report.random_rankings: 0", result.changed(replace(config, report=replace(report, random_rankings=0)))
    if report.extent == "full":
        yield (
            "report.extent: none, without held-out curves",
            result.changed(replace(config, report=replace(report, extent="none"))),
        )
    if report.full_search:
        yield "report.full_search: false", result.changed(replace(config, report=replace(report, full_search=False)))
    ranked = layers // 4 if search.position_layers is None else search.position_layers
    if ranked < layers // 2:
        fewer = replace(search, position_layers=layers // 2)
        yield (
            f"search.position_layers: {layers // 2}, as many layers are not searched",
            result.changed(replace(config, search=fewer)),
        )
    if search.method == "greedy":
        yield "search.method: one_shot, an approximation", result.changed(replace(config, search=search.by("one_shot")))
    if search.stopping == "none" and search.method == "greedy":
        yield "search.stopping: exact", result.changed(replace(config, search=replace(search, stopping="exact")))
    if len(search.operators) > 1:
        one = replace(search, operators=search.operators[:1])
        yield f"search.operators: {search.operators[0]} alone", result.changed(replace(config, search=one))
