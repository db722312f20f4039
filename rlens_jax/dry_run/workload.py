"""Counts how much a ranking run computes: the runs of its programs, and the layers in them.

The run's code for the search, the held-out curves, the schedule of blocks and the bookkeeping of base states does the counting.
All plans get equal scores, so the later layer wins every round. No order costs more, because the next round's candidates share
the fewest layers with their base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlens_jax.config import RunConfig
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.pages import DATASETS
from rlens_jax.data.splits import PAGES, split_samples
from rlens_jax.engine.schedule import StoredStates, filled_blocks, first_layer, memory_parts, schedule
from rlens_jax.plan import Operator, Plan
from rlens_jax.search.curves import held_out_plans
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import Ranking, rank_layers

PAPER_SAMPLES = 2350
"""Validation samples of the paper (second-hand), and as many samples for the curves (our assumption)."""

_TIE = PlanScore(0.0, 0.0, {})


@dataclass(frozen=True)
class Samples:
    """Size of a split."""

    samples: int
    rows: int
    """Pairs of a sample and a reference answer."""
    images: int
    source: str
    """Where the numbers come from."""


@dataclass
class Phase:
    """Runs of the programs in one part of the run. All work groups take part in every run at the same time."""

    name: str
    evaluations: int = 0
    """Plans evaluated on a whole split."""
    steps: int = 0
    """Evaluations of a batch: runs of `outcome`, or of `generate`."""
    layer_steps: int = 0
    """Layers run, including those for base states. A step counts as its longest item."""
    states_made: int = 0
    """Runs of `layers` for base states, one layer each."""
    embeddings: int = 0
    """Runs of `embed`."""
    images: int = 0
    """Images through `encode`, each once."""


@dataclass(frozen=True)
class Workload:
    """The work of a run, and the data that it keeps in memory."""

    phases: tuple[Phase, ...]
    samples: Mapping[str, Samples]
    """Sizes by split."""
    resident_bytes: int
    """Base states on a device, which stay in memory while the search's programs run."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the work, in addition to the configuration."""

    num_layers: int
    groups: int
    """Work groups of the mesh."""
    block_bytes: int
    """States of one work group's block of a batch."""

    @property
    def state_bytes(self) -> int:
        """Base states of a batch on a device."""
        return self.block_bytes * self.num_layers


class Counter:
    """Counts the work of an `Evaluator` on a split of `rows` rows, into `phase`.

    Args:
        batch_size: rows per block of a work group.
        forced: whether answers are teacher-forced from base states; else they are generated from the prompt.
        state_bytes: memory for base states per device.
    """

    def __init__(self, phase: Phase, sizes: Sizes, *, rows: int, batch_size: int, forced: bool, state_bytes: float):
        self.phase = phase
        self._num_layers = sizes.num_layers
        self._forced = forced
        self._filled = filled_blocks(rows, batch_size, sizes.groups)
        self._parts = memory_parts([sizes.state_bytes] * len(self._filled), state_bytes)
        self._stored = [StoredStates() for _ in self._filled]
        self._evaluated: set[Plan] = set()

    def evaluate(self, base: Plan, plans: Sequence[Plan]) -> None:
        """Count as `Evaluator.outcomes`; plans that were evaluated before cost nothing."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._evaluated]
        self._evaluated.update(new)
        self.phase.evaluations += len(new)
        if not new:
            return
        starts = [first_layer(base, plan, self._num_layers) if self._forced else 0 for plan in new]
        if len(self._parts) > 1:
            self._stored = [StoredStates() for _ in self._filled]
        for part in self._parts:
            filled = [self._filled[number] for number in part]
            for step in schedule(filled, [self._num_layers - start for start in starts]):
                self.phase.steps += 1
                if self._forced:
                    used = {starts[item.plan] for item in step.items if item is not None}
                    self._count_layers(self._stored[part[step.batch]], base, sorted(used))

    def _count_layers(self, stored: StoredStates, base: Plan, starts: Sequence[int]) -> None:
        """Count the layers of one step, whose items start at these layers from the states of `base`."""
        for start in starts:
            upkeep = stored.require(base, start)
            self.phase.embeddings += upkeep.kept == 0
            self.phase.states_made += len(upkeep.layers)
            self.phase.layer_steps += len(upkeep.layers)
        self.phase.layer_steps += self._num_layers - starts[0]


def workload(config: RunConfig, sizes: Sizes) -> Workload:
    """The phases of a run, on the samples of its data source or as many samples as in the paper."""
    samples = sample_counts(config)
    forced = config.search.objective == "teacher_forced"
    budget, batch_size = config.compute.state_memory_gb * 1e9, config.compute.batch_size
    rows = {name: split.rows if forced else split.samples for name, split in samples.items()}

    def counter(name: str, split: str) -> Counter:
        return Counter(Phase(name), sizes, rows=rows[split], batch_size=batch_size, forced=forced, state_bytes=budget)

    phases = [Phase("vision", images=sum(split.images for split in samples.values()))]
    rankings: list[tuple[Ranking, Ranking | None]] = []
    for operator in config.search.operators:
        counts = counter(f"ranking {operator}", "validation")
        rankings.append(count_search(config, operator, sizes.num_layers, counts.evaluate))
        phases.append(counts.phase)
    curves = counter("held-out curves", "test")
    curves.evaluate(Plan(), [Plan()])
    for ranking, complete in rankings:
        curves.evaluate(Plan(), held_out_plans(ranking, config.report.random_rankings, config.seed, complete))
    most = max(len(filled_blocks(number, batch_size, sizes.groups)) for number in rows.values())
    resident = round(min(budget, most * sizes.state_bytes)) if forced else 0
    return Workload((*phases, curves.phase), samples, resident)


def count_search(
    config: RunConfig, operator: Operator, num_layers: int, evaluate: Callable[[Plan, Sequence[Plan]], None]
) -> tuple[Ranking, Ranking | None]:
    """Run the searches for one operator; returns their rankings, the second one of a search without position prior.

    `evaluate` counts the evaluation of plans from the states of a base.
    """

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        evaluate(base, candidates)
        return [_TIE] * len(candidates)

    base = config.search.base()
    evaluate(Plan(), [Plan()])
    ranking = rank_layers(num_layers, config.search.position_layers, operator, score_round, base)
    if not config.report.full_search:
        return ranking, None
    return ranking, rank_layers(num_layers, 0, operator, score_round, base)


def sample_counts(config: RunConfig) -> dict[str, Samples]:
    """Sizes of the splits: of the data source if it exists, else as many samples as in the paper."""
    data = config.data
    if data.source == PAGES:
        limits = {"validation": data.validation_samples, "test": data.test_samples}
        text = f"{len(DATASETS)} datasets of pages"
        counts = {split: limit * len(DATASETS) for split, limit in limits.items()}
        return {split: Samples(count, count, count, text) for split, count in counts.items()}
    if data.source is None or not Path(data.source).exists():
        reason = "no data is named" if data.source is None else f"{data.source} does not exist"
        text = f"as many as in the paper, because {reason}"
        paper = Samples(PAPER_SAMPLES, PAPER_SAMPLES, PAPER_SAMPLES, text)
        return {"validation": paper, "test": paper}
    splits = split_samples(read_jsonl(Path(data.source)), data, config.seed)
    return {
        name: Samples(len(split), sum(len(s.answers) for s in split), sum(len(s.images) for s in split), f"of {data.source}")
        for name, split in splits.items()
    }
