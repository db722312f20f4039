"""Held-out curves: which plans they need, and what the outcomes of these plans say.

The curves rest on samples that the search never saw. All strategies are drawn on the same samples.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlens_jax.plan import Plan
from rlens_jax.search.bootstrap import Interval, area_under_curve, bootstrap_interval, mean_over_datasets
from rlens_jax.search.objective import dataset_metric, plan_loss
from rlens_jax.search.results import Curve, Metrics, OperatorResult, RandomCurves, Saving, Strategy
from rlens_jax.search.search import Ranking, position_ranking, prefix_plans, random_rankings

Outcomes = Mapping[Plan, Mapping[str, Sequence[float] | np.ndarray]]
"""Plan -> dataset -> one outcome a held-out sample."""
FlopsSaved = Callable[[Plan, bool], float]
"""Maps (plan, whether probes count) to the share of the dense prefill's multiply-adds that is saved."""


def random_points(num_layers: int) -> tuple[int, ...]:
    """At how many reduced layers random rankings are tried: L/6, L/3, L/2, 2L/3, 5L/6, rounded."""
    sixths = (1, 2, 3, 4, 5)
    return tuple(sorted({max(1, (2 * num_layers * sixth + 6) // 12) for sixth in sixths}))


def held_out_plans(ranking: Ranking, num_random: int, seed: int, search_all: Ranking | None) -> list[Plan]:
    """Every plan that `operator_result` asks the outcomes of, each once; the base comes first.

    Args:
      ranking: the searched ranking.
      num_random: how many random rankings.
      seed: of the random rankings.
      search_all: the ranking with L_p = 0, to compare with.
    """
    orders = [*_orders(ranking, search_all).values()]
    plans = [plan for order in orders for plan in prefix_plans(ranking.operator, order, ranking.base)]
    for order in random_rankings(len(ranking.order), num_random, seed):
        prefixes = prefix_plans(ranking.operator, order, ranking.base)
        plans += [prefixes[k] for k in random_points(len(order))]
    return list(dict.fromkeys(plans))


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
) -> OperatorResult:
    """One operator's curves, areas and saving, from the outcomes of `held_out_plans` with the same arguments.

    Args:
      ranking, num_random, search_all: as in `held_out_plans`.
      outcomes: of the plans, on held-out samples.
      dense: the dense model's held-out metrics.
      flops_saved: what a plan saves.
      seed: of the random rankings, and of the bootstrap.
      bootstrap_samples: how many draws.
      relative: whether losses are relative to the dense metrics (as the search's changes).
    """
    datasets = list(dense)

    def table(plans: Sequence[Plan]) -> dict[str, np.ndarray]:
        return {name: np.array([outcomes[plan][name] for plan in plans], np.float64) for name in datasets}

    def metrics(plan: Plan) -> Metrics:
        return {name: dataset_metric(np.asarray(outcomes[plan][name]).tolist()) for name in datasets}

    prefixes = {
        strategy: prefix_plans(ranking.operator, order, ranking.base)
        for strategy, order in _orders(ranking, search_all).items()
    }
    curves: dict[Strategy, Curve] = {}
    for strategy, plans in prefixes.items():
        points = tuple(metrics(plan) for plan in plans)
        curves[strategy] = Curve(
            order=_orders(ranking, search_all)[strategy],
            metrics=points,
            losses=tuple(plan_loss(point, dense, relative=relative) for point in points),
            mean=bootstrap_interval(table(plans), mean_over_datasets, samples=bootstrap_samples, seed=seed),
        )

    num_layers = len(ranking.order)
    orders = random_rankings(num_layers, num_random, seed)
    random_prefixes = [prefix_plans(ranking.operator, order, ranking.base) for order in orders]
    random = RandomCurves(
        orders=tuple(orders),
        num_reduced=random_points(num_layers),
        means=tuple(
            tuple(dataset_metric(list(metrics(plans[k]).values())) for k in random_points(num_layers))
            for plans in random_prefixes
        ),
    )

    # With no layer and with all, every order gives the same plan; between, compare where random is known.
    area_points = (0, *(k for k in random_points(num_layers) if k < num_layers), num_layers)
    at_points = {strategy: table([plans[k] for k in area_points]) for strategy, plans in prefixes.items()}
    drawn = [table([plans[k] for k in area_points]) for plans in random_prefixes]
    at_points["random"] = {name: np.mean([values[name] for values in drawn], axis=0) for name in datasets}
    area = area_under_curve(area_points)
    count = len(area_points)

    def interval(values: Mapping[str, np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return bootstrap_interval(values, statistic, samples=bootstrap_samples, seed=seed)

    def margin(other: Mapping[str, np.ndarray]) -> Interval:
        both = {name: np.concatenate([at_points["searched"][name], other[name]]) for name in datasets}
        return interval(both, lambda drawn: area(drawn[:, :count]) - area(drawn[:, count:]))

    searched = curves["searched"]
    saved = prefixes["searched"][searched.allowed]
    return OperatorResult(
        ranking=ranking,
        curves=curves,
        random=random,
        area_points=area_points,
        areas={strategy: interval(values, area) for strategy, values in at_points.items()},
        margins={strategy: margin(values) for strategy, values in at_points.items() if strategy != "searched"},
        saving=plan_saving(saved, searched.metrics[searched.allowed], dense, flops_saved, relative=relative),
    )


def plan_saving(plan: Plan, metrics: Metrics, dense: Metrics, flops_saved: FlopsSaved, *, relative: bool) -> Saving:
    """What a plan saves and loses, from its held-out metrics."""
    return Saving(
        plan=plan,
        loss=plan_loss(metrics, dense, relative=relative),
        flops=flops_saved(plan, False),
        flops_with_probes=flops_saved(plan, True),
    )


def _orders(ranking: Ranking, search_all: Ranking | None) -> dict[Strategy, tuple[int, ...]]:
    orders: dict[Strategy, tuple[int, ...]] = {"searched": ranking.order}
    if search_all is not None:
        orders["search_all"] = search_all.order
    orders["position"] = position_ranking(len(ranking.order))
    return orders
