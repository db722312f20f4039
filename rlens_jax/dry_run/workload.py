"""How much a ranking run has to compute: its programs' runs, counted by the algorithms of the run itself.

The search, the held-out curves, the schedule of blocks on work groups and the upkeep of base states are those of the run, over
plans whose scores all tie, so that the later layer wins every round. Which layer wins decides how many layers the candidates
of the next round share with their base: later layers first is the dearest order there is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlens_jax.config import RunConfig
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.data.pages import DATASETS
from rlens_jax.data.samples import Sample
from rlens_jax.data.splits import PAGES, split_samples
from rlens_jax.engine.schedule import schedule
from rlens_jax.plan import Operator, Plan
from rlens_jax.search.curves import held_out_plans
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import Ranking, rank_layers

PAPER_SAMPLES = 2350
"""Validation instances of the paper (second hand), and as many for the curves (our assumption)."""

_TIE = PlanScore(0.0, 0.0, {})


@dataclass(frozen=True)
class Samples:
    """What a split holds, in rows and images."""

    samples: int
    rows: int
    """Pairs of a sample and a reference answer."""
    images: int
    source: str
    """Where the numbers are from, in words."""


@dataclass
class Phase:
    """Runs of the programs in one part of the run; every step keeps all work groups busy at the same time."""

    name: str
    evaluations: int = 0
    """Plans evaluated on a whole split."""
    steps: int = 0
    """Evaluations of a batch, of the longest item in it: runs of `outcome`, or of `generate`."""
    layer_steps: int = 0
    """Layers that these run, the upkeep of base states included."""
    states_made: int = 0
    """Runs of `layers` for the upkeep of base states, one layer each."""
    embeddings: int = 0
    """Runs of `embed`."""
    images: int = 0
    """Images through `encode`, each once."""


@dataclass(frozen=True)
class Workload:
    """What a run has to do, and what it keeps in memory meanwhile."""

    phases: tuple[Phase, ...]
    samples: Mapping[str, Samples]
    """By split."""
    resident_bytes: int
    """On a device, beside the programs of the search: base states."""


@dataclass
class _Upkeep:
    """What a batch's base states hold, as `TeacherForcing` keeps them."""

    plan: Plan = field(default_factory=Plan)
    held: int = 0
    """Layers whose inputs are there; 0 before the first embedding."""

    def at(self, plan: Plan, layer: int, phase: Phase) -> None:
        if not self.held:
            self.held = 1
            phase.embeddings += 1
        first = self.plan.lowest_difference(plan)
        if first is not None:
            self.held, self.plan = min(self.held, first + 1), plan
        made = max(0, layer + 1 - self.held)
        self.held += made
        phase.states_made += made
        phase.layer_steps += made


class Counter:
    """Counts what an `Evaluator` would run on one split.

    Args:
        phase: counts go here.
        rows: rows of the split.
        batch_size: rows of a work group's block.
        groups: work groups.
        num_layers: of the decoder.
        forced: teacher forcing, from base states; else every plan is generated from its prompt.
        keeps_states: all base states fit into memory; else they are made anew for every question.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        rows: int,
        batch_size: int,
        groups: int,
        num_layers: int,
        forced: bool,
        keeps_states: bool,
    ):
        self.phase = phase
        self._forced = forced
        self._keeps_states = keeps_states
        self._num_layers = num_layers
        self._filled = list(filled_blocks(rows, batch_size, groups))
        self._states = [_Upkeep() for _ in self._filled]
        self._known: set[Plan] = set()

    def ask(self, base: Plan, plans: Sequence[Plan]) -> None:
        """As `Evaluator.outcomes`; plans that were evaluated before cost nothing."""
        todo = [plan for plan in dict.fromkeys(plans) if plan not in self._known]
        self._known.update(todo)
        self.phase.evaluations += len(todo)
        if not todo:
            return
        if not self._keeps_states:
            self._states = [_Upkeep() for _ in self._filled]
        firsts = [self._first_layer(base, plan) for plan in todo]
        costs = [self._num_layers - first for first in firsts]
        for step in schedule(self._filled, costs):
            chosen = {firsts[item.plan] for item in step.items if item is not None}
            self.phase.steps += 1
            if self._forced:
                for first in sorted(chosen):
                    self._states[step.batch].at(base, first, self.phase)
                self.phase.layer_steps += self._num_layers - min(chosen)

    def _first_layer(self, base: Plan, plan: Plan) -> int:
        if not self._forced:
            return 0
        difference = base.lowest_difference(plan)
        return self._num_layers - 1 if difference is None else difference


def filled_blocks(rows: int, batch_size: int, groups: int) -> Iterator[list[bool]]:
    """For each batch, which groups' blocks have rows, when all rows are of one bucket."""
    blocks = -(-rows // batch_size)
    while blocks > 0:
        yield [group < blocks for group in range(groups)]
        blocks -= groups


@dataclass(frozen=True)
class Sizes:
    """What decides how much a run computes and keeps, beside its configuration."""

    num_layers: int
    groups: int
    """Work groups of the mesh."""
    block_bytes: int
    """States of one work group's block of a batch."""


def workload(config: RunConfig, sizes: Sizes) -> Workload:
    """The phases of a run on so many work groups, with the samples of its data source or of the paper."""
    samples = sample_counts(config)
    forced = config.search.objective == "teacher_forced"
    batches = {
        name: len(list(filled_blocks(_rows(split, forced), config.compute.batch_size, sizes.groups)))
        for name, split in samples.items()
    }
    state_bytes = sizes.block_bytes * sizes.num_layers
    budget = config.compute.state_memory_gb * 1e9

    def counter(name: str, split: str) -> Counter:
        return Counter(
            Phase(name),
            rows=_rows(samples[split], forced),
            batch_size=config.compute.batch_size,
            groups=sizes.groups,
            num_layers=sizes.num_layers,
            forced=forced,
            keeps_states=batches[split] * state_bytes <= budget,
        )

    phases = [Phase("vision", images=sum(split.images for split in samples.values()))]
    rankings: list[tuple[Ranking, Ranking | None]] = []
    for operator in config.search.operators:
        counted = counter(f"ranking {operator}", "validation")
        counted.ask(Plan(), [Plan()])
        rankings.append(_rank(config, operator, sizes.num_layers, counted))
        phases.append(counted.phase)
    curves = counter("held-out curves", "test")
    curves.ask(Plan(), [Plan()])
    for ranking, complete in rankings:
        curves.ask(Plan(), held_out_plans(ranking, config.report.random_rankings, config.seed, complete))
    resident = round(min(budget, max(batches.values()) * state_bytes)) if forced else 0
    return Workload((*phases, curves.phase), samples, resident)


def _rank(config: RunConfig, operator: Operator, num_layers: int, counted: Counter) -> tuple[Ranking, Ranking | None]:
    """The searches for one operator, over plans that all tie."""

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        counted.ask(base, candidates)
        return [_TIE] * len(candidates)

    base = config.search.base()
    ranking = rank_layers(num_layers, config.search.position_layers, operator, score_round, base)
    if not config.report.full_search:
        return ranking, None
    return ranking, rank_layers(num_layers, 0, operator, score_round, base)


def _rows(samples: Samples, forced: bool) -> int:
    return samples.rows if forced else samples.samples


def sample_counts(config: RunConfig) -> dict[str, Samples]:
    """What the splits hold: of the data source where it is there, else as many samples as the paper used."""
    data = config.data
    if data.source == PAGES:
        limits = {"validation": data.validation_samples, "test": data.test_samples}
        text = f"{len(DATASETS)} datasets of pages"
        counts = {split: limit * len(DATASETS) for split, limit in limits.items()}
        return {split: Samples(count, count, count, text) for split, count in counts.items()}
    if not Path(data.source).exists():
        text = f"as in the paper, since {data.source} is not there"
        paper = Samples(PAPER_SAMPLES, PAPER_SAMPLES, PAPER_SAMPLES, text)
        return {"validation": paper, "test": paper}
    splits = split_samples(
        read_jsonl(Path(data.source)),
        validation_samples=data.validation_samples,
        test_samples=data.test_samples,
        held_out_share=data.held_out_share,
        seed=config.seed,
        where=data.source,
    )
    return {name: _counted(members, data.source) for name, members in splits.items()}


def _counted(samples: Sequence[Sample], source: str) -> Samples:
    return Samples(
        len(samples),
        sum(len(sample.answers) for sample in samples),
        sum(len(sample.images) for sample in samples),
        f"of {source}",
    )
