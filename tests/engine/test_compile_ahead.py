"""Programs that are compiled before their first use, on a mesh of both axes."""

from dataclasses import replace

import numpy as np
import pytest

from rlens_jax.engine.compile_ahead import compile_ahead
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Block
from rlens_jax.engine.timing import time_plans
from rlens_jax.models.prompt import Places
from rlens_jax.plans import Plan
from tests.engine.toy import LAYERS, SHAPES, ToyPreparer, toy_programs, toy_samples

pytestmark = pytest.mark.slow


def split_of(programs: Programs) -> Split:
    """Samples with any answer."""
    return build_split([replace(sample, answers=("5",)) for sample in toy_samples()], ToyPreparer(), programs, SHAPES, True)


def test_a_run_uses_what_was_compiled_ahead() -> None:
    programs = toy_programs(devices=4, model_shards=2)
    split = split_of(programs)
    blocks = {}
    for pool in split.pools:
        layout = pool.inputs.layout
        places = Places(layout.max_branches, pool.inputs.answer_slots.shape[1], layout.leading_text)
        blocks[pool.bucket] = Block(pool.block_rows, places)
    compile_ahead(programs, SHAPES, blocks, forced=True)
    traces = dict(programs.traces)
    assert {traces[name] for name in ("embed", "layers", "outcome")} == {len(blocks)}
    for batch in split.batches:
        states = programs.embed(batch.inputs.text_ids, batch.visual)
        states = programs.layers(states, batch.inputs, Plan(ffn=(1, 3)), 0, LAYERS)
        _, _, values, finite = map(np.asarray, programs.outcome(states, batch.inputs))
        assert np.isfinite(values).all() and finite.all()
    assert dict(programs.traces) == traces


def test_each_plan_is_compiled_once_for_all_timings() -> None:
    programs = toy_programs()
    batch = split_of(programs).batches[0]
    plans = {"ffn": Plan(ffn=(1, 3)), "nothing": Plan(), "again": Plan(ffn=(1, 3))}
    for repeats in (1, 2):
        times = time_plans(programs, batch, plans, repeats)
        assert {name: (len(each.dense), len(each.reduced)) for name, each in times.items()} == dict.fromkeys(
            plans, (repeats,) * 2
        )
        assert programs.traces["static prefill"] == 2
