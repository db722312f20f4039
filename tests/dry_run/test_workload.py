"""The counts of a dry run, compared with the evaluator's steps over programs that only count."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.config import ComputeConfig, DataConfig, ReportConfig, RunConfig, SearchConfig
from rlens_jax.dry_run.workload import Counter, Phase, Sizes, count_search, workload
from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.programs import Programs, States
from rlens_jax.engine.schedule import filled_blocks, memory_parts, schedule
from rlens_jax.engine.scoring import TeacherForcing
from rlens_jax.plan import Plan

LAYERS = 8
SIZES = Sizes(num_layers=LAYERS, groups=1, block_bytes=10)


def run_config(**search: Any) -> RunConfig:
    return RunConfig(
        data=DataConfig("pages"),
        search=SearchConfig(**search),
        compute=ComputeConfig(batch_size=10, state_memory_gb=1),
        report=ReportConfig(random_rankings=1),
    )


def phases(config: RunConfig, sizes: Sizes = SIZES) -> dict[str, Phase]:
    return {phase.name: phase for phase in workload(config, sizes).phases}


def test_evaluations_are_those_of_the_algorithm() -> None:
    found = phases(run_config())
    searched = LAYERS - LAYERS // 4
    assert found["ranking attention"].evaluations == 1 + LAYERS // 4 + searched * (searched + 1) // 2
    # 360 samples in batches of 10
    assert found["ranking ffn"].steps == 36 * found["ranking ffn"].evaluations
    assert found["ranking ffn"].embeddings == 36


def test_layers_of_a_search_by_hand() -> None:
    config = run_config(position_layers=1, operators=("ffn",))
    sizes = Sizes(num_layers=3, groups=1, block_bytes=1)
    counted = Counter(Phase("one batch"), sizes, rows=1, batch_size=1, forced=True, state_bytes=3)
    count_search(config, "ffn", 3, counted.evaluate)
    # dense: two states are made, one layer runs; the last layer alone; two rounds: from 0 and 1, then from 0
    assert counted.phase.layer_steps == (2 + 1) + 1 + (3 + 2) + 3
    assert (counted.phase.evaluations, counted.phase.states_made, counted.phase.embeddings) == (5, 2, 1)


def test_states_that_do_not_fit_are_made_anew_for_every_question() -> None:
    config = run_config(position_layers=1, operators=("ffn",))
    small = replace(config, compute=replace(config.compute, state_memory_gb=0))
    assert phases(small)["ranking ffn"].states_made > 3 * phases(config)["ranking ffn"].states_made


def test_work_groups_share_the_batches() -> None:
    alone, shared = (phases(run_config(), replace(SIZES, groups=n))["ranking ffn"] for n in (1, 36))
    assert alone.steps == 36 * shared.steps
    assert alone.layer_steps == 36 * shared.layer_steps


def test_what_is_kept_in_memory() -> None:
    # 36 validation batches and 45 test batches, whose visual tokens stay; base states of the larger split
    assert workload(run_config(), SIZES).resident_bytes == 45 * 10 * LAYERS
    tight = replace(run_config(), compute=ComputeConfig(batch_size=10, state_memory_gb=1e-6))
    assert workload(tight, SIZES).resident_bytes == 1000


def test_generation_starts_from_the_prompt() -> None:
    found = phases(run_config(objective="generation"))["ranking ffn"]
    assert found.layer_steps == found.embeddings == 0
    assert found.steps == 36 * found.evaluations


def test_a_data_source_that_is_not_there_is_the_papers() -> None:
    config = run_config()
    missing = replace(config, data=replace(config.data, source="nowhere.jsonl"))
    samples = workload(missing, SIZES).samples["validation"]
    assert samples.samples == 2350
    assert "nowhere.jsonl does not exist" in samples.source


@dataclass
class CountingPrograms(Programs):
    """Stands in for `Programs`: counts the layers that run, of the group that runs the most."""

    groups: int = 1
    layer_steps: int = 0
    embeddings: int = 0
    outcomes: int = 0

    config = SimpleNamespace(num_layers=LAYERS, width=4)
    dtype = np.dtype(np.float32)

    def embed(self, text_ids: Any, visual: Any) -> States:
        self.embeddings += 1
        return jnp.zeros((1, 1, 4)), jnp.ones(1, bool)

    def layers(self, states: States, batch: Any, plans: Any, starts: Any, stop: int) -> States:
        self.layer_steps += stop - min(starts)
        return states

    def outcome(self, states: States, batch: Any) -> None:
        self.outcomes += 1

    def route(self, arrays: Any, sources: Any) -> Any:
        return arrays

    def choose(self, first: Any, states: States, others: States) -> States:
        return states


def empty_batch() -> Batch:
    """A batch whose content is never read."""
    batch = object.__new__(Batch)
    for name, value in {"inputs": SimpleNamespace(text_ids=None), "visual": None}.items():
        object.__setattr__(batch, name, value)
    return batch


@pytest.mark.parametrize("state_bytes", [0, 1e9])
@pytest.mark.parametrize(("groups", "rows"), [(1, 30), (3, 90), (4, 90), (4, 20)])
def test_against_the_evaluators_own_steps(groups: int, rows: int, state_bytes: float) -> None:
    sizes = Sizes(num_layers=LAYERS, groups=groups, block_bytes=1)
    counted = Counter(Phase("counted"), sizes, rows=rows, batch_size=10, forced=True, state_bytes=state_bytes)
    programs = CountingPrograms(groups)
    scoring = TeacherForcing(programs)
    filled = filled_blocks(rows, 10, groups)
    batches = [empty_batch() for _ in filled]
    parts = memory_parts([LAYERS] * len(filled), state_bytes)
    evaluated: set[Plan] = set()

    def both(base: Plan, plans: Sequence[Plan]) -> None:
        """Count, and start the same steps as the evaluator."""
        counted.evaluate(base, plans)
        new = [plan for plan in plans if plan not in evaluated]
        evaluated.update(new)
        for part in parts if new else []:
            if len(parts) > 1:
                scoring.release()
            costs = [scoring.cost(base, plan) for plan in new]
            for step in schedule([filled[number] for number in part], costs):
                items = [item or next(filter(None, step.items)) for item in step.items]
                plans_of_groups, blocks = [new[item.plan] for item in items], [item.block for item in items]
                scoring.start(batches[part[step.batch]], base, plans_of_groups, blocks)

    count_search(run_config(), "attention", LAYERS, both)
    phase = counted.phase
    assert (programs.layer_steps, programs.embeddings, programs.outcomes) == (
        phase.layer_steps, phase.embeddings, phase.steps,
    )  # fmt: skip
