"""The dry run of a configuration: count its work, compile the programs that do most of it, and estimate its time."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.checkpoints.checkpoint import kind_in
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.checkpoints.published import CONFIG
from rlens_jax.config import RunConfig
from rlens_jax.data.samples import Sample
from rlens_jax.dry_run.data_sizes import DataSizes, Row, data_sizes
from rlens_jax.dry_run.estimate import Estimate, Links, Times, estimate, program_times
from rlens_jax.dry_run.program import Program, ProgramSpec, compile_program, program_specs
from rlens_jax.dry_run.topology import Slice, ring_rate, slice_devices
from rlens_jax.dry_run.workload import Sizes, Workload, workload
from rlens_jax.engine.choices import with_dtype
from rlens_jax.engine.preparing import Images, PreparedSplit, RowSizes, SampleSizes
from rlens_jax.engine.shapes import Shapes, choose_shapes
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import ImageSize
from rlens_jax.sharding.mesh import check_fits, make_mesh


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    config: RunConfig
    """The configuration, with its dtype filled in."""
    kind: ModelKind
    target: Slice
    mesh_shape: tuple[int, int]
    """Devices along `work` and `model`."""
    links: Links
    data: DataSizes
    shapes: Shapes
    programs: tuple[Program, ...]
    workload: Workload
    times: Times | None
    """Times of the programs; None if one did not compile."""

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def estimate(self) -> Estimate | None:
        """The time of the run; None if a program did not compile."""
        return None if self.times is None else estimate(self.workload, self.times, self.target.chips)

    def changed(self, config: RunConfig, *, slices: int = 1, share: float = 1.0) -> float:
        """Likely seconds of the run after a change.

        Args:
            config: its configuration.
            slices: how many times larger the slice is.
            share: the share of the samples that is left.
        """
        assert self.times is not None
        groups = self.workload.groups * slices
        rows = {
            name: [members[int(place / share)] for place in range(max(1, int(share * len(members))))]
            for name, members in self.data.rows.items()
        }
        work = workload(config, _sizes(config, self.kind, groups), self.shapes, rows)
        return estimate(work, self.times, self.target.chips * slices).likely


def dry_run(config: RunConfig, target: Slice, *, all_buckets: bool, progress: Callable[[str], None]) -> DryRun:
    """Compile the programs of a configuration for a slice. libtpu is loaded into this process.

    Args:
        config: the run.
        target: the slice.
        all_buckets: compile the programs of every bucket, not only of that with most work and the largest.
        progress: called with a line at each step.

    Raises:
        UserError: the model's config.json is missing or not supported, devices or model do not divide over the mesh, or the data
            are not usable.
    """
    folder = find_model(config.model, weights=False)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: has no {CONFIG}; a dry run needs the checkpoint's {CONFIG}, but no weights")
    kind = kind_in(folder)
    config = with_dtype(config, "tpu")
    jax.config.update("jax_default_matmul_precision", config.compute.matmul_precision)
    devices, shards = slice_devices(target), config.compute.model_shards
    check_fits(kind.config.decoder.sizes, shards)
    mesh = make_mesh(devices, shards)
    data = data_sizes(config, kind, folder)
    progress(f"sizes of rows and images: {data.source}")
    shapes = choose_shapes(config.compute, kind, [_as_prepared(name, rows) for name, rows in data.rows.items()])
    mesh_shape = (len(devices) // shards, shards)
    counts = workload(config, _sizes(config, kind, mesh_shape[0]), shapes, data.rows)
    rows, images = to_compile(counts, shapes, everything=all_buckets)
    specs = list(program_specs(config, kind, mesh, rows, images))

    def compiled(spec: ProgramSpec) -> Program:
        progress(f"compiling {spec.name} ({spec.bucket})")
        return compile_program(spec, mesh_shape, counts.resident_bytes, target.memory_limit)

    began = time.process_time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = tuple(pool.map(compiled, specs))
    links = Links(ring_rate(target, mesh.devices[0].tolist()), target.link_rate)
    times = program_times(programs, target, links, time.process_time() - began)
    return DryRun(config, kind, target, mesh_shape, links, data, shapes, programs, counts, times)


def _sizes(config: RunConfig, kind: ModelKind, groups: int) -> Sizes:
    decoder, compute = kind.config.decoder, config.compute
    slot_bytes = decoder.width * jnp.dtype(compute.dtype).itemsize / compute.model_shards
    return Sizes(decoder.num_layers, groups, slot_bytes, decoder.deepstack)


def _as_prepared(split: str, rows: Sequence[Row]) -> PreparedSplit:
    """The rows as `choose_shapes` takes them, one to a sample."""
    nothing: Any = None
    samples = tuple(
        Sample(f"row {number} of {split} ({row.dataset})", row.dataset, (), "", ()) for number, row in enumerate(rows)
    )
    numbers = range(len(rows))
    sizes_only = partial(RowSizes, answers=0, leading_text=0)
    row_sizes = tuple(sizes_only((number,), row.size[0], row.size[1]) for number, row in zip(numbers, rows, strict=True))
    sizes = tuple(SampleSizes(row.size, row.size[0]) for row in rows)
    images = {number: tuple(row.images) for number, row in zip(numbers, rows, strict=True)}
    return PreparedSplit(samples, np.arange(len(rows)), row_sizes, sizes, images, Images((), nothing), nothing)


def to_compile(work: Workload, shapes: Shapes, *, everything: bool) -> tuple[dict[Bucket, int], dict[ImageSize, int]]:
    """The buckets to compile, each with the rows, or images, of a work group's block."""
    rows, slots, patches = {}, dict.fromkeys(shapes.rows, 0), dict.fromkeys(work.image_sizes, 0)
    for split in work.splits.values():
        for load in split.buckets:
            rows[load.bucket] = load.block_rows
            slots[load.bucket] += load.slots
        for size, count in split.images.items():
            patches[size] += count * math.prod(size)
    used = sorted(rows, key=lambda bucket: bucket.slots)
    by_patches = sorted(work.image_sizes, key=math.prod)
    return (
        {bucket: rows[bucket] for bucket in _most(slots, used, everything)},
        {size: work.together(size) for size in _most(patches, by_patches, everything)},
    )


def _most(work: Mapping[Any, int], used: Sequence[Any], everything: bool) -> list[Any]:
    """All of `used`, or the bucket with most work, for its time, and the largest, which is the last one, for its memory."""
    most = max(used, key=lambda bucket: work[bucket], default=None)
    return [bucket for bucket in used if everything or bucket in (most, used[-1])]
