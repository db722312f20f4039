"""Held-out curves: the plans they need, and the results of these plans.

Curves use samples that the search never saw. All strategies share the same bootstrap draws.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlens_jax.plans import Plan
from rlens_jax.search.bootstrap import Interval, Statistic, area_under_curve, bootstrap_interval, mean_over_datasets
from rlens_jax.search.objective import Metrics, dataset_metric, plan_loss
from rlens_jax.search.results import Curve, OperatorResult, RandomCurves, Saving, Strategy
from rlens_jax.search.search import Ranking, position_ranking, prefix_plans

Outcomes = Mapping[Plan, Mapping[str, Sequence[float] | np.ndarray]]
"""Plan -> dataset -> outcomes, one per held-out sample."""
FlopsSaved = Callable[[Plan, bool], float]
"""Maps (plan, whether probes count) to the share of the dense prefill's multiply-adds that is saved."""


def random_rankings(num_layers: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` random orders of all layers; the first k do not depend on `count`."""
    draw = random.Random(seed)
    return [tuple(draw.sample(range(num_layers), num_layers)) for _ in range(count)]


def random_points(num_layers: int) -> tuple[int, ...]:
    """The numbers of reduced layers at which random rankings are evaluated: L/6, L/3, L/2, 2L/3, 5L/6, rounded."""
    sixths = (1, 2, 3, 4, 5)
    return tuple(sorted({max(1, (2 * num_layers * sixth + 6) // 12) for sixth in sixths}))


def held_out_plans(ranking: Ranking, num_random: int, seed: int, search_all: Ranking | None) -> list[Plan]:
    """All plans whose outcomes `operator_result` needs, each once, in the order of `chain_order`: the base first.

    Args:
        ranking: the searched ranking.
        num_random: number of random rankings; `seed` draws them.
        search_all: the ranking with L_p = 0, for comparison.
    """
    orders = [*_orders(ranking, search_all).values()]
    plans = [plan for order in orders for plan in prefix_plans(ranking.operator, order, ranking.base)]
    for order in random_rankings(len(ranking.order), num_random, seed):
        prefixes = prefix_plans(ranking.operator, order, ranking.base)
        plans += [prefixes[k] for k in random_points(len(order))]
    return chain_order(plans, len(ranking.order))


def chain_order(plans: Iterable[Plan], num_layers: int) -> list[Plan]:
    """The plans, each once, in the order in which a chain runs the fewest layers.

    In a chain, each plan starts from the states of the one before at the first layer in which they differ. Sorted by what they do
    in layer 0, then in layer 1, and so on, all plans that treat the first k layers alike follow each other, so these layers run
    once for all of them.
    """

    def treatment(plan: Plan) -> list[tuple[str, str]]:
        return [
            (str(attention), str(ffn)) for attention, ffn in plan.settings(num_layers)
        ]  # any order that keeps equals together

    return sorted(dict.fromkeys(plans), key=treatment)


def operator_result(
    ranking: Ranking,
    outcomes: Outcomes,
    dense: Metrics,
    flops_saved: FlopsSaved,
    *,
    num_random: int,
    seed: int,
    search_all: Ranking | None,
    bootstrap_samples: int,
    relative: bool,
    images: Mapping[str, np.ndarray],
) -> OperatorResult:
    """Curves, areas and saving of one operator, from the outcomes of `held_out_plans` with the same arguments.

    Args:
        ranking, num_random, search_all: as in `held_out_plans`.
        outcomes, dense: outcomes of the plans and metrics of the dense model, both on held-out samples.
        seed: seed of the random rankings and of the bootstrap.
        relative: whether losses are relative to the dense metrics, as changes are in the search.
        images: as in `bootstrap_interval`.
    """
    held_out = _HeldOut(outcomes, dense, relative, bootstrap_samples, seed, images)
    orders = _orders(ranking, search_all)
    prefixes = {name: prefix_plans(ranking.operator, order, ranking.base) for name, order in orders.items()}
    curves = {name: held_out.curve(order, prefixes[name]) for name, order in orders.items()}

    num_layers, points = len(ranking.order), random_points(len(ranking.order))
    random_orders = random_rankings(num_layers, num_random, seed)
    random_prefixes = [prefix_plans(ranking.operator, order, ranking.base) for order in random_orders]
    means = (tuple(held_out.mean(plans[k]) for k in points) for plans in random_prefixes)
    random = RandomCurves(orders=tuple(random_orders), num_reduced=points, means=tuple(means))

    # All orders give the same plan with no layer and with all layers; between, compare at the points of random rankings.
    area_points = (0, *(k for k in points if k < num_layers), num_layers)
    tables = {name: held_out.table([plans[k] for k in area_points]) for name, plans in prefixes.items()}
    if random_prefixes:
        random_tables = [held_out.table([plans[k] for k in area_points]) for plans in random_prefixes]
        tables["random"] = {name: np.mean([table[name] for table in random_tables], axis=0) for name in dense}
    area = area_under_curve(area_points)

    searched, allowed = curves["searched"], curves["searched"].allowed
    return OperatorResult(
        ranking=ranking,
        curves=curves,
        random=random,
        area_points=area_points,
        areas={name: held_out.interval(table, area) for name, table in tables.items()},
        margins={
            name: held_out.difference(tables["searched"], table, area) for name, table in tables.items() if name != "searched"
        },
        saving=plan_saving(prefixes["searched"][allowed], searched.metrics[allowed], dense, flops_saved, relative=relative),
    )


def plan_saving(plan: Plan, metrics: Metrics, dense: Metrics, flops_saved: FlopsSaved, *, relative: bool) -> Saving:
    """The saving and the loss of a plan, from its held-out metrics."""
    return Saving(
        plan=plan,
        loss=plan_loss(metrics, dense, relative=relative),
        flops=flops_saved(plan, False),
        flops_with_probes=flops_saved(plan, True),
    )


@dataclass(frozen=True)
class _HeldOut:
    """Statistics of held-out outcomes; the fields are arguments of `operator_result`."""

    outcomes: Outcomes
    dense: Metrics
    relative: bool
    bootstrap_samples: int
    seed: int
    images: Mapping[str, np.ndarray]

    def table(self, plans: Sequence[Plan]) -> dict[str, np.ndarray]:
        """Outcomes per dataset: float64[plans, samples]."""
        return {name: np.array([self.outcomes[plan][name] for plan in plans], np.float64) for name in self.dense}

    def metrics(self, plan: Plan) -> Metrics:
        return {name: dataset_metric(np.asarray(self.outcomes[plan][name]).tolist()) for name in self.dense}

    def mean(self, plan: Plan) -> float:
        return dataset_metric(list(self.metrics(plan).values()))

    def curve(self, order: tuple[int, ...], plans: Sequence[Plan]) -> Curve:
        points = tuple(self.metrics(plan) for plan in plans)
        losses = tuple(plan_loss(point, self.dense, relative=self.relative) for point in points)
        return Curve(order, points, losses, mean=self.interval(self.table(plans), mean_over_datasets))

    def interval(self, table: Mapping[str, np.ndarray], statistic: Statistic) -> Interval:
        return bootstrap_interval(table, statistic, images=self.images, samples=self.bootstrap_samples, seed=self.seed)

    def difference(self, table: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], statistic: Statistic) -> Interval:
        """The interval of the statistic of `table` minus that of `other`, on the same draws."""
        both = {name: np.concatenate([table[name], other[name]]) for name in table}
        count = len(next(iter(table.values())))
        return self.interval(both, lambda drawn: statistic(drawn[:, :count]) - statistic(drawn[:, count:]))


def _orders(ranking: Ranking, search_all: Ranking | None) -> dict[Strategy, tuple[int, ...]]:
    orders: dict[Strategy, tuple[int, ...]] = {"searched": ranking.order}
    if search_all is not None:
        orders["search_all"] = search_all.order
    orders["position"] = position_ranking(len(ranking.order))
    return orders
