"""The counts of a dry run: rows in blocks, and layers per block by what is reduced in them."""

from dataclasses import replace
from typing import Any

import pytest

from rlens_jax.config import ComputeConfig, ReportConfig, RunConfig, SearchConfig
from rlens_jax.dry_run.data_sizes import Row
from rlens_jax.dry_run.workload import BlockCounter, Phase, Sizes, Workload, count_search, workload
from rlens_jax.engine.shapes import Shapes
from rlens_jax.forecast import RACED_SHARE
from rlens_jax.layout import Bucket
from rlens_jax.plans import Plan

LAYERS = 8
SIZES = Sizes(num_layers=LAYERS, groups=4, slot_bytes=10)
SHAPES = Shapes((Bucket(8, 8), Bucket(8, 56)), ((16,), (64,)), lambda size: (), 1)


def rows(count: int, visual: int = 50) -> tuple[Row, ...]:
    return (Row("d", (8, visual), ((visual,),), 2, 3, 3 * visual),) * count


ROWS = {"validation": (*rows(9), *rows(4, 8)), "test": rows(6)}


def run_config(**search: Any) -> RunConfig:
    compute = ComputeConfig(batch_size=2, state_memory_gb=1)
    return RunConfig(search=SearchConfig(**search), compute=compute, report=ReportConfig(random_rankings=1))


def counted(config: RunConfig, sizes: Sizes = SIZES) -> Workload:
    return workload(config, sizes, SHAPES, ROWS)


def phases(config: RunConfig) -> dict[str, Phase]:
    return {phase.name: phase for phase in counted(config).phases}


def test_evaluations_are_those_of_the_algorithm() -> None:
    found = phases(run_config())
    searched = LAYERS - LAYERS // 4
    for name in ("ranking attention", "ranking ffn"):
        assert found[name].evaluations == 1 + LAYERS // 4 + searched * (searched + 1) // 2
        assert found[name].embeddings == 1


def search(layers: int, **changes: Any) -> Phase:
    block = BlockCounter(Phase("search", "validation"), layers, forced=True, keeps_states=changes.pop("keeps_states", True))
    count_search(run_config(position_layers=1, operators=("ffn",), **changes), "ffn", layers, block.evaluate)
    return block.phase


def test_layers_of_a_search_by_hand() -> None:
    found = search(3, stopping="none")
    # Dense: two states are made. The last layer, which no plan runs, alone. Two rounds: from 0 and 1, then from 0.
    assert (found.evaluations, found.state_runs, found.embeddings) == (5, 2, 1)
    assert found.state_layers == {"dense": 2, "attention": 0, "ffn": 0, "both": 0}
    dense, reduced = 1 + 0, (1 + 1) + 2
    assert found.layers == {"dense": dense, "attention": 0, "ffn": reduced, "both": 0}
    assert (found.steps, found.from_first) == (5, 15)


def test_early_stopping_leaves_a_share_of_the_rounds_with_several_candidates() -> None:
    found = search(3)
    assert found.layers["ffn"] == pytest.approx(RACED_SHARE * (1 + 1) + 2)
    assert found.steps == pytest.approx(3 + 2 * RACED_SHARE)


def test_one_shot_has_one_round_in_full() -> None:
    found = search(3, method="one_shot")
    # Dense, the last layer, the candidates of layers 0 and 1.
    assert (found.evaluations, found.layers["ffn"]) == (4, 1 + 1)


def test_states_that_do_not_fit_are_made_anew_for_every_round() -> None:
    kept, anew = search(LAYERS), search(LAYERS, keeps_states=False)
    assert anew.state_runs > 3 * kept.state_runs
    assert anew.embeddings > kept.embeddings == 1


def test_held_out_plans_start_where_they_differ_from_the_one_before() -> None:
    block = BlockCounter(Phase("curves", "test"), 3, forced=True, keeps_states=True)
    block.chain([Plan(), Plan(ffn=(2,)), Plan(ffn=(1, 2)), Plan(ffn=(0, 1, 2))])
    # dense; then layer 2 alone, layers 1 and 2, all: each from where it differs, up to the last layer
    assert block.phase.evaluations == 4
    assert block.phase.layers == {"dense": 2, "attention": 0, "ffn": 1 + 2, "both": 0}


def test_without_curves_the_test_split_is_not_evaluated() -> None:
    bare = replace(run_config(), report=ReportConfig(extent="none"))
    assert list(phases(run_config())) == [*phases(bare), "held-out curves"]


def test_rows_of_the_groups_in_blocks() -> None:
    validation, test = (counted(run_config()).splits[name] for name in ("validation", "test"))
    small, large = validation.buckets
    # Three places beside nine large rows are filled with small ones.
    assert (small.rows, small.block_rows, small.blocks) == (1, 1, 1)
    assert (large.rows, large.block_rows, large.blocks) == (12, 2, 2)
    (other,) = test.buckets
    assert (other.rows, other.block_rows, other.blocks) == (6, 2, 1)
    assert (validation.samples, validation.branches, validation.rows) == (26, 39, 13)
    assert validation.images == {(64,): 3, (16,): 1}


def test_more_groups_have_fewer_blocks() -> None:
    alone, shared = (counted(run_config(), replace(SIZES, groups=n)) for n in (1, 13))
    assert sum(load.slots for load in alone.splits["validation"].buckets) > 4 * 64
    assert [load.blocks for load in shared.splits["validation"].buckets] == [1]
    assert shared.fill < alone.fill <= 1


def test_what_is_kept_in_memory() -> None:
    # Two blocks of two rows of 64 slots, and one of 16
    assert counted(run_config()).resident_bytes == LAYERS * 10 * (2 * 2 * 64 + 16)
    tight = replace(run_config(), compute=ComputeConfig(batch_size=2, state_memory_gb=1e-6))
    assert counted(tight).resident_bytes == 1000


def test_generation_starts_from_the_prompt() -> None:
    found = phases(run_config(objective="generation", stopping="none"))["ranking ffn"]
    assert sum(found.layers.values()) == found.embeddings == found.state_runs == 0
    assert found.steps == found.evaluations
