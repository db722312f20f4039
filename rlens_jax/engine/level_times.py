"""Measured times of one decoder layer at each pair of levels, per bucket: what the joint search spends its budget of time by.

All layers of a model have one shape, so one table serves all of them. The times of a device are measured once for a run and kept
in `level_times.json`, so that a resumed run searches by the same ones.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from rlens_jax.console import Progress
from rlens_jax.engine.model_programs import ROWS
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.programs import Programs, States
from rlens_jax.engine.timing import static_prefill, time_turns, warm_up
from rlens_jax.errors import UserError
from rlens_jax.files import check_schema, json_text, read_json_object, replace_file
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.plans import Level, Levels, Plan

LEVEL_TIMES = "level_times.json"
SCHEMA = "rlens-level-times/1"
SECONDS = 5.0
"""For which the programs of a bucket are timed, compilation not counted (our decision)."""
TIMED_LAYERS = 2
"""Layers that run one after another in what is timed, so that the start of a program counts less."""


@dataclass(frozen=True)
class BucketTimes:
    """The times of one bucket's batch.

    Attributes:
        text_slots, visual_slots: the bucket.
        rows: rows of the timed batch.
        share: the share of the samples' rows that are in this bucket.
        layer: [attention level][ffn level], the least seconds of one layer.
        prefill: the least seconds of the whole dense prefill, in which the last layer skips visual rows.
    """

    text_slots: int
    visual_slots: int
    rows: int
    share: float
    layer: tuple[tuple[float, ...], ...]
    prefill: float


@dataclass(frozen=True)
class LevelTimes:
    """The time table of a device; `levels` names the rows and columns of the buckets' tables."""

    device: str
    levels: Levels
    buckets: tuple[BucketTimes, ...]


def time_levels(programs: Programs, pools: Sequence[Pool], levels: Levels, dense: Plan, repeats: int) -> LevelTimes:
    """Time a layer at each pair of levels, and the whole prefill under `dense`, on the first batch of each pool.

    The programs of a bucket take turns, at least `repeats` times and for about `SECONDS`. The least time counts: other work on
    the machine can only add to it, and the search would take what it adds for a saving.
    """
    total, buckets = sum(pool.samples[:, :, 0].size for pool in pools), []
    pairs = list(itertools.product(levels.attention, levels.ffn))
    with Progress("timing levels", len(pools) * (len(pairs) + 1), "programs") as progress:
        for pool in pools:
            batch = pool.batches()[0]
            calls = [_layers(programs, batch, *pair) for pair in pairs]
            calls.append(partial(static_prefill(programs, dense), programs.put(batch.visual), batch.inputs))
            warm_up(calls, progress.advance)
            once = sum(turn.wall for (turn,) in time_turns(calls, 1))
            *layers, whole = (
                min(turn.wall for turn in turns) for turns in time_turns(calls, max(repeats, round(SECONDS / once)))
            )
            width, run = len(levels.ffn), min(TIMED_LAYERS, programs.config.num_layers)
            table = tuple(
                tuple(seconds / run for seconds in layers[first : first + width]) for first in range(0, len(layers), width)
            )
            rows, share = batch.inputs.samples.shape[0], pool.samples[:, :, 0].size / total
            buckets.append(BucketTimes(pool.bucket.text, pool.bucket.visual, rows, share, table, whole))
    return LevelTimes(jax.devices()[0].device_kind, levels, tuple(buckets))


def _layers(programs: Programs, batch: Batch, attention: Level, ffn: Level) -> Callable[[], Any]:
    """A call of the first layers at these levels, compiled for them alone."""
    layers = range(min(TIMED_LAYERS, programs.config.num_layers))
    plan = Plan.of(dict.fromkeys(layers, attention), dict.fromkeys(layers, ffn))

    def run(model: Any, states: States, inputs: PromptBatch) -> Any:
        decoder, key, features = model.decoder, programs.random_key(), states.features
        context = decoder.context(inputs.layout, inputs.rope_positions, key, programs.kernel, features=features)
        x, record = decoder.prefill(states.x, context, plan, programs.reduction, layers)
        return x, record.k, record.v

    program = programs.program("layer levels", run, (ROWS, ROWS), ROWS)
    return partial(program, programs.embed(batch.inputs.text_ids, batch.visual), batch.inputs)


def kept_level_times(
    path: Path, model_hash: str, levels: Levels, processes: Processes, measure: Callable[[], LevelTimes]
) -> LevelTimes:
    """The times in the file, if they are of this model, device and these levels; else they are measured and written.

    Every process calls it and gets the times of process 0. UserError if the file is damaged, of another run, or not writable.
    """
    known = processes.agreed(lambda: _read(path, model_hash, levels) if path.exists() else None)
    fields = known or {"schema": SCHEMA, "model_hash": model_hash, **asdict(measure())}
    fields = processes.gather(json.loads(json_text(fields)))[0]
    if known is None and processes.leads:
        replace_file(path, json_text(fields).encode())
    buckets = [BucketTimes(**{**bucket, "layer": tuple(map(tuple, bucket["layer"]))}) for bucket in fields["buckets"]]
    return LevelTimes(fields["device"], levels, tuple(buckets))


def _read(path: Path, model_hash: str, levels: Levels) -> dict[str, Any]:
    fields = read_json_object(path)
    check_schema(fields, Path(__file__).with_suffix(".schema.json"), path)
    ours = {"model_hash": model_hash, "device": jax.devices()[0].device_kind, "levels": json.loads(json_text(asdict(levels)))}
    if different := [name for name, value in ours.items() if fields[name] != value]:
        raise UserError(f"{path} has times of another {different[0]}; move it away, or name another output folder")
    return fields
