"""Counts what a ranking run computes: rows in buckets and blocks, plans, and layers per block by what is reduced in them.

The search and the plans of the held-out curves are the run's own code. All plans get equal scores, so the later layer wins every
round. No order costs more, because the next round's candidates share the fewest layers with their base.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlens_jax.config import RunConfig
from rlens_jax.dry_run.costs import LAYER_KINDS, LayerKind
from rlens_jax.dry_run.data_sizes import Row
from rlens_jax.engine.dealing import fill_buckets, rows_per_block
from rlens_jax.engine.encoding import images_together
from rlens_jax.engine.schedule import first_layer
from rlens_jax.engine.shapes import Shapes, row_slots, useful_rows
from rlens_jax.forecast import RACED_SHARE
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import ImageSize
from rlens_jax.plans import FULL, Operator, Plan
from rlens_jax.search.curves import chain_order, held_out_plans
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.search import Ranking, rank_layers

Layers = dict[LayerKind, float]
_KINDS: dict[tuple[bool, bool], LayerKind] = {
    (False, False): "dense",
    (True, False): "attention",
    (False, True): "ffn",
    (True, True): "both",
}
_TIE = PlanScore(0.0, 0.0, {})


@dataclass
class Phase:
    """What one part of the run computes on every block of a split."""

    name: str
    split: str
    evaluations: int = 0
    """Plans."""
    steps: float = 0
    """Runs of `last layer` and `outcome`, or of `generate`, per block."""
    layers: Layers = field(default_factory=lambda: dict.fromkeys(LAYER_KINDS, 0.0))
    """Layers run per block, by kind, without those for base states."""
    from_first: int = 0
    """Layers per block if every plan ran from the first layer on every sample."""
    state_runs: int = 0
    """Runs of `layers` that make base states, per block."""
    state_layers: Layers = field(default_factory=lambda: dict.fromkeys(LAYER_KINDS, 0.0))
    embeddings: int = 0
    """Runs of `embed` per block."""


@dataclass(frozen=True)
class BucketLoad:
    """The rows of a split in one bucket."""

    bucket: Bucket
    rows: int
    tokens: int
    block_rows: int
    """Rows of a work group's block."""
    blocks: int
    """Blocks of each work group."""

    @property
    def block_slots(self) -> int:
        """Slots of a work group's block."""
        return self.bucket.slots * self.block_rows

    @property
    def slots(self) -> int:
        """Slots of all blocks of a work group."""
        return self.block_slots * self.blocks

    @property
    def visual_slots(self) -> int:
        """Those for visual tokens."""
        return self.bucket.visual * self.block_rows * self.blocks


@dataclass(frozen=True)
class SplitLoad:
    """The rows and images of a split on the mesh."""

    samples: int
    branches: int
    buckets: tuple[BucketLoad, ...]
    images: Mapping[ImageSize, int]
    """Images that the busiest work group encodes, by bucket."""

    @property
    def rows(self) -> int:
        return sum(load.rows for load in self.buckets)


@dataclass(frozen=True)
class Workload:
    """The work of a run, and the data that it keeps in memory."""

    phases: tuple[Phase, ...]
    splits: Mapping[str, SplitLoad]
    groups: int
    batch_size: int
    """Rows of the largest bucket in a block, and most images that are encoded together."""
    resident_bytes: int
    """Base states on a device, which stay in memory while the search's programs run."""

    @property
    def fill(self) -> float:
        """The share of the slots of all blocks that holds tokens."""
        loads = [load for split in self.splits.values() for load in split.buckets]
        return sum(load.tokens for load in loads) / (self.groups * sum(load.slots for load in loads))

    @property
    def image_sizes(self) -> list[ImageSize]:
        """The buckets of images that are used."""
        return sorted({size for split in self.splits.values() for size in split.images})

    def together(self, size: ImageSize) -> int:
        """Images of a bucket that a work group encodes together."""
        return images_together(self.batch_size, math.prod(size))


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the work, in addition to the configuration and the data."""

    num_layers: int
    groups: int
    """Work groups of the mesh."""
    slot_bytes: float
    """The state of one token in one layer on a device."""
    deepstack: int = 0
    """Deepstack features of a visual token, each as large as a state."""


def workload(config: RunConfig, sizes: Sizes, shapes: Shapes, rows: Mapping[str, Sequence[Row]]) -> Workload:
    """The phases of a run on the rows of each split."""
    batch_size = config.compute.batch_size or useful_rows(shapes)
    splits = split_loads(rows, shapes, sizes.groups, batch_size)
    forced = config.search.objective != "generation"
    states = {
        name: sizes.slot_bytes
        * sum(sizes.num_layers * load.slots + sizes.deepstack * load.visual_slots for load in split.buckets)
        for name, split in splits.items()
    }
    budget = config.compute.state_memory_gb * 1e9

    def counter(name: str, split: str) -> BlockCounter:
        return BlockCounter(Phase(name, split), sizes.num_layers, forced=forced, keeps_states=states[split] <= budget)

    phases, rankings = [], []
    for operator in config.search.operators:
        counts = counter(f"ranking {operator}", "validation")
        rankings.append(count_search(config, operator, sizes.num_layers, counts.evaluate))
        phases.append(counts.phase)
    if config.report.extent == "full":
        curves = counter("held-out curves", "test")
        plans = [Plan()]
        for ranking, complete in rankings:
            plans += held_out_plans(ranking, config.report.random_rankings, config.seed, complete)
        curves.chain(chain_order(plans, sizes.num_layers))
        phases.append(curves.phase)
    resident = round(min(budget, max(states.values()))) if forced else 0
    return Workload(tuple(phases), splits, sizes.groups, batch_size, resident)


def split_loads(rows: Mapping[str, Sequence[Row]], shapes: Shapes, groups: int, largest_rows: int) -> dict[str, SplitLoad]:
    """The rows of each split in buckets and blocks.

    A block has as many slots as `largest_rows` rows of the largest bucket, at most. Its rows are the same in all splits.
    """
    members: dict[str, dict[Bucket, list[Row]]] = {}
    buckets = [bucket.size for bucket in shapes.rows]
    for name, own in rows.items():
        members[name] = defaultdict(list)
        for row, number in zip(own, fill_buckets([row.size for row in own], buckets, row_slots, groups), strict=True):
            members[name][shapes.rows[number]].append(row)
    block_rows = {
        bucket: rows_per_block(bucket.slots, -(-most // groups), largest_rows * shapes.largest.slots)
        for bucket in shapes.rows
        if (most := max(len(own[bucket]) for own in members.values()))
    }
    return {name: _split_load(rows[name], own, shapes, groups, block_rows) for name, own in members.items()}


def _split_load(
    rows: Sequence[Row], members: Mapping[Bucket, Sequence[Row]], shapes: Shapes, groups: int, block_rows: Mapping[Bucket, int]
) -> SplitLoad:
    loads = [
        BucketLoad(bucket, len(own), sum(sum(row.size) for row in own), size, -(-len(own) // (groups * size)))
        for bucket, size in block_rows.items()
        if (own := members[bucket])
    ]
    images = Counter(shapes.image(size) for row in rows for size in row.images)
    return SplitLoad(
        samples=sum(row.samples for row in rows),
        branches=sum(row.branches for row in rows),
        buckets=tuple(loads),
        images={size: -(-count // groups) for size, count in images.items()},
    )


class BlockCounter:
    """Counts the work of an evaluator on one block, into `phase`.

    Args:
        forced: whether answers are teacher-forced from base states; else they are generated from the prompt.
        keeps_states: whether the base states of a whole split fit into memory; else each question makes them anew.
    """

    def __init__(self, phase: Phase, num_layers: int, *, forced: bool, keeps_states: bool):
        self.phase = phase
        self._num_layers = num_layers
        self._forced = forced
        self._keeps_states = keeps_states
        self._stored, self._held = Plan(), 0
        """Stored are the states that enter layers 0 .. `held` - 1 under this plan."""
        self._evaluated: set[Plan] = set()

    def evaluate(self, base: Plan, plans: Sequence[Plan], remaining: float) -> None:
        """Count plans that start from the states of `base`; of several, stopping leaves the share `remaining`.

        Plans that were evaluated before cost nothing.
        """
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._evaluated]
        if not new:
            return
        starts = [self._start(base, plan) for plan in new]
        if self._forced:
            self._make_states(base, max(starts))
        share = remaining if len(new) > 1 else 1.0
        for plan, start in zip(new, starts, strict=True):
            self._count(plan, start, share)

    def chain(self, plans: Sequence[Plan]) -> None:
        """Count plans that each start from the states of the one before."""
        before: Plan | None = None
        for plan in plans:
            self.phase.embeddings += self._forced and before is None
            self._count(plan, 0 if before is None else self._start(before, plan), 1.0)
            before = plan

    def _start(self, base: Plan, plan: Plan) -> int:
        return first_layer(base, plan, self._num_layers) if self._forced else 0

    def _count(self, plan: Plan, start: int, share: float) -> None:
        self._evaluated.add(plan)
        self.phase.evaluations += 1
        self.phase.steps += share
        self.phase.from_first += self._num_layers
        if self._forced:
            for kind in self._kinds(plan)[start:-1]:  # the last layer has a program of its own
                self.phase.layers[kind] += share

    def _make_states(self, base: Plan, last: int) -> None:
        """Count what makes the states that enter the layers up to `last` under `base`."""
        difference = self._stored.lowest_difference(base)
        kept = self._held if difference is None else min(self._held, difference + 1)
        if not self._keeps_states:
            kept = 0
        self._stored, self._held = base, max(kept, last + 1)
        self.phase.embeddings += kept == 0
        for kind in self._kinds(base)[max(kept, 1) - 1 : last]:
            self.phase.state_layers[kind] += 1
            self.phase.state_runs += 1

    def _kinds(self, plan: Plan) -> list[LayerKind]:
        """What is reduced in each layer."""
        return [_KINDS[attention != FULL, ffn != FULL] for attention, ffn in plan.settings(self._num_layers)]


def count_search(
    config: RunConfig, operator: Operator, num_layers: int, evaluate: Callable[[Plan, Sequence[Plan], float], None]
) -> tuple[Ranking, Ranking | None]:
    """Run the searches for one operator; returns their rankings, the second one of a search without position prior.

    `evaluate` counts the evaluation of plans from the states of a base, and the share that early stopping leaves of it.
    """
    search = config.search.by(config.search.method)
    remaining = 1.0 if search.stopping == "none" else RACED_SHARE

    def score_round(base: Plan, candidates: list[Plan]) -> list[PlanScore]:
        evaluate(base, candidates, remaining)
        return [_TIE] * len(candidates)

    base = search.base()
    evaluate(Plan(), [Plan()], 1.0)
    ranking = rank_layers(num_layers, search.position_layers, operator, score_round, base, search.method)
    if not config.report.full_search:
        return ranking, None
    return ranking, rank_layers(num_layers, 0, operator, score_round, base, search.method)
