"""From a path to its published plan, and what it is compared with, on held-out samples and by the clock."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import jax
import numpy as np

from rlens_jax.config import DIVERGENCES
from rlens_jax.console import Progress
from rlens_jax.engine.evaluator import Evaluator, Outcomes
from rlens_jax.engine.inputs import Split
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.timing import time_plans
from rlens_jax.flops import prefill_cost
from rlens_jax.planning.planner import Planner
from rlens_jax.plans import OPERATORS, Plan
from rlens_jax.search.bootstrap import Interval, bootstrap_interval, mean_over_datasets
from rlens_jax.search.confirmation import CONFIDENCE, HeldOutLoss, held_out_losses, last_confirmed, least_samples, milestones
from rlens_jax.search.curves import chain_order
from rlens_jax.search.front import DOWN_SAMPLED, Front, FrontPoint, Kind, PrefillTime, undominated
from rlens_jax.search.joint import Path, State, in_order, last_layers_first
from rlens_jax.search.objective import dataset_metrics, relative_changes


@dataclass(frozen=True, eq=False)
class Smaller:
    """The held-out samples with down-sampled images."""

    evaluator: Evaluator
    name: str
    """Its split."""
    timed: Batch
    """The samples of the first batch of the split that was not down-sampled."""

    @property
    def split(self) -> Split:
        return self.evaluator.splits[self.name]


@dataclass(frozen=True)
class Rival:
    """A plan to compare with, its predicted share of the dense cost, if known, and its loss in the search, if known."""

    kind: Kind
    plan: Plan
    cost: float | None
    search_loss: float | None = None
    smaller: Smaller | None = None
    """What it runs on in place of the samples as they are."""


@dataclass(frozen=True)
class Frontier:
    """Confirms a path and compares its plans.

    Attributes:
        planner: the search.
        evaluator: evaluates plans on the held-out samples, perhaps by another measure than the search.
        held_out: their split.
        model_hash, data_hash: as in ranking.json.
        smaller: the samples of the split with down-sampled images.
    """

    planner: Planner
    evaluator: Evaluator
    held_out: str
    model_hash: str
    data_hash: str
    smaller: Sequence[Smaller] = ()

    def front(self, path: Path, rivals: Sequence[Rival] = ()) -> Front:
        """Confirm the path's milestones, publish one, and compare it with `rivals` and with plans that need no search."""
        planner, config = self.planner, self.planner.config
        dense = Rival("dense", planner.plan(planner.space.start), 1.0, path.points[0].loss)
        marked = milestones(path, config.joint.milestones)
        joint = [Rival("joint", planner.plan(point.state), point.cost, point.loss) for point in marked]
        tested, outcomes = self._confirmed(dense, joint)
        published, verdict = self._published(self._losses(tested, outcomes), marked)
        others = list(rivals)
        if published:
            others += self._controls(marked[published - 1].cost)
        others += [replace(dense, kind=DOWN_SAMPLED, cost=None, search_loss=None, smaller=each) for each in self.smaller]
        outcomes |= self._outcomes(others)
        compared, data = [*tested, *others], self._split
        return Front(
            budget=planner.budget,
            cost="flops" if planner.budget.kind == "flops" else config.joint.cost,
            levels=planner.levels,
            num_layers=planner.num_layers,
            path=path,
            points=self._points(compared, outcomes, data.batches[0], published, len(tested)),
            published=published,
            verdict=verdict,
            samples=data.sizes,
            images=self._num_images,
            model_hash=self.model_hash,
            data_hash=self.data_hash,
            device=jax.devices()[0].device_kind,
            settings=config.portable(),
        )

    @property
    def _split(self) -> Split:
        return self.evaluator.splits[self.held_out]

    @property
    def _num_images(self) -> int:
        return len(np.unique(self._split.image_groups))

    def check_defined(self) -> None:
        """Raise UserError if the held-out loss is not defined: it is relative, and the dense model scores 0."""
        dense = Rival("dense", self.planner.plan(self.planner.space.start), 1.0)
        self._losses([dense], self._outcomes([dense]))

    def _confirmed(self, dense: Rival, joint: Sequence[Rival]) -> tuple[list[Rival], dict[Rival, Outcomes]]:
        """Dense and the milestones up to the first that breaks a budget of loss, and the last milestone, with their outcomes."""
        budget, tested = self.planner.budget, [dense, *joint]
        if budget.kind != "loss":
            return tested, self._outcomes(tested)
        with Progress("milestones", len(tested), "plans") as progress:
            outcomes = self._evaluated([dense], progress)
            for each in joint:
                outcomes |= self._evaluated([each], progress)
                if self._losses([dense, each], outcomes)[1].bound > budget.share:
                    break
            outcomes |= self._evaluated([each for each in joint[-1:] if each not in outcomes], progress)
            progress.advance(len(tested) - len(outcomes))
        return list(outcomes), outcomes

    def _outcomes(self, rivals: Sequence[Rival]) -> dict[Rival, Outcomes]:
        """The held-out outcomes of plans, with their progress."""
        with Progress("held-out plans", len({each.plan for each in rivals if each.smaller is None}), "plans") as progress:
            return self._evaluated(rivals, progress)

    def _evaluated(self, rivals: Sequence[Rival], progress: Progress) -> dict[Rival, Outcomes]:
        """The held-out outcomes of plans, each evaluated once."""
        ordered = chain_order([each.plan for each in rivals if each.smaller is None], self.planner.num_layers)
        whole = dict(zip(ordered, self.evaluator.chain(self.held_out, ordered, progress), strict=True))

        def of(rival: Rival) -> Outcomes:
            if rival.smaller is None:
                return whole[rival.plan]
            # No answer needs what the last layer does for visual rows, which is all that the plan leaves out.
            return rival.smaller.evaluator.outcomes(rival.smaller.name, Plan(), [Plan()])[0]

        return {rival: of(rival) for rival in rivals}

    def _losses(self, rivals: Sequence[Rival], outcomes: Mapping[Rival, Outcomes]) -> list[HeldOutLoss]:
        """Each plan's loss against the first one, the dense model. UserError if it is not defined."""
        config = self.planner.config
        relative = config.search.change == "relative" and config.held_out_measure not in DIVERGENCES
        dense, *_ = rivals
        metrics = dataset_metrics(outcomes[dense])
        relative_changes(metrics, metrics, relative=relative)
        return held_out_losses(
            [outcomes[each] for each in rivals],
            outcomes[dense],
            self._split.images,
            relative=relative,
            samples=config.report.bootstrap_samples,
            seed=config.seed,
        )

    def _published(self, losses: Sequence[HeldOutLoss], marked: Sequence[object]) -> tuple[int, str]:
        """The number of the plan to publish among dense and the milestones, and why."""
        budget, images = self.planner.budget, self._num_images
        if not marked:
            return 0, "no move saves cost within the budget, so the dense model is published"
        if budget.kind != "loss":
            loss = losses[-1]
            return len(marked), (
                f"the path reaches the budget; its held-out loss is {_percent(loss.value)}, at most {_percent(loss.bound)} with "
                f"{CONFIDENCE:.0%} confidence"
            )
        least = least_samples(budget.share)
        if images < least:
            return 0, (
                f"the held-out samples have {images} images, too few to confirm a loss of {_percent(budget.share)} with "
                f"{CONFIDENCE:.0%} confidence, which takes at least {least}; so the dense model is published"
            )
        passed = last_confirmed(losses[1:], budget.share)
        if not passed:
            return 0, (
                f"the first of {len(marked)} milestones loses {_percent(losses[1].value)} held out, but perhaps "
                f"{_percent(losses[1].bound)}, more than {_percent(budget.share)}; so the dense model is published"
            )
        return passed, (
            f"milestone {passed} of {len(marked)} loses {_percent(losses[passed].value)} held out, at most "
            f"{_percent(losses[passed].bound)} with {CONFIDENCE:.0%} confidence"
        )

    def _controls(self, cost: float) -> list[Rival]:
        """Plans of about the same cost that need no search: the last layers, and moves in random order."""
        planner = self.planner
        space = planner.space
        moves = space.all_moves()
        random.Random(planner.config.seed).shuffle(moves)
        orders: dict[Kind, State] = {
            "position": in_order(space, planner.costs, last_layers_first(space), cost),
            "random": in_order(space, planner.costs, moves, cost),
        }
        return [Rival(kind, planner.plan(state), planner.costs.share(state)) for kind, state in orders.items()]

    def _points(
        self, rivals: Sequence[Rival], outcomes: Mapping[Rival, Outcomes], batch: Batch, published: int, tested: int
    ) -> tuple[FrontPoint, ...]:
        config, data = self.planner.config, self._split
        table = {name: np.stack([outcomes[each][name] for each in rivals]) for name in data.datasets}
        interval = partial(
            bootstrap_interval, table, images=data.images, samples=config.report.bootstrap_samples, seed=config.seed
        )
        scores = interval(mean_over_datasets)
        count = len(rivals)

        def between(metrics: np.ndarray) -> np.ndarray:
            mean = mean_over_datasets(metrics)
            return (mean[:, :, None] - mean[:, None, :]).reshape(len(mean), count * count)

        below = interval(between, level=2 * CONFIDENCE - 1).low.reshape(count, count)
        losses, times = self._losses(rivals, outcomes), self._times(rivals, batch, published, tested)
        medians = [None if time is None else median(time.reduced) / median(time.dense) for time in times]
        front = undominated(medians, below)
        flops = [self._flops(each) for each in rivals]
        return tuple(
            FrontPoint(
                kind=each.kind,
                plan=each.plan,
                cost=each.cost,
                flops=flops[place] / flops[0],
                visual_tokens=float((each.smaller.split if each.smaller else data).num_visual.mean()),
                score=Interval(*(np.asarray(part[place]) for part in (scores.value, scores.low, scores.high))),
                loss=losses[place],
                search_loss=each.search_loss,
                time=times[place],
                on_front=front[place],
            )
            for place, each in enumerate(rivals)
        )

    def _flops(self, rival: Rival) -> float:
        """The share of the multiply-adds of `Plan()` on the samples as they are, mean over the samples."""
        layers, reduction = self.planner.num_layers, self.planner.config.reduction
        cost = partial(prefill_cost, self.evaluator.scoring.programs.config.layer_sizes, reduction=reduction, with_probes=True)
        whole = self._split.num_tokens
        own = whole if rival.smaller is None else rival.smaller.split.num_tokens
        shares = [
            cost(text, [visual] * layers, rival.plan) / cost(all_text, [all_visual] * layers, Plan())
            for (text, visual), (all_text, all_visual) in zip(own, whole, strict=True)
        ]
        return sum(shares) / len(shares)

    def _times(self, rivals: Sequence[Rival], batch: Batch, published: int, tested: int) -> list[PrefillTime | None]:
        """Prefill times of dense, of the published plan and the last milestone, and of all rivals; not of other milestones.

        Down-sampled images are timed on the same samples, in a bucket of their own.
        """
        repeats = self.planner.config.report.timing_repeats
        places = [place for place in range(len(rivals)) if place in (0, published, tested - 1) or place >= tested]
        wanted = {str(place): rivals[place].plan for place in places}
        own = {str(place): smaller.timed for place in places if (smaller := rivals[place].smaller)}
        timed = time_plans(self.evaluator.scoring.programs, batch, wanted, repeats, baseline=rivals[0].plan, batches=own)
        return [timed.get(str(place)) for place in range(len(rivals))]


def single_operators(planner: Planner) -> list[Rival]:
    """The last plans of the search with one operator alone, where both have levels."""
    rivals = []
    for operator in OPERATORS:
        if all(planner.space.lowest.values()):
            point = planner.search(planner.alone(operator), f"{operator} alone").points[-1]
            rivals.append(Rival(operator, planner.plan(point.state), point.cost, point.loss))
    return rivals


def _percent(share: float) -> str:
    return f"{round(100 * share, 2) + 0:.2f} %"
