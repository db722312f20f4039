"""A synthetic finished run: layers of known cost, outcomes drawn from the costs, and the real search over them."""

import dataclasses
import functools

import numpy as np

from rlens_jax.config import ComputeConfig, DataConfig, ReportConfig, RunConfig, SearchConfig
from rlens_jax.flops import LayerSizes, saving
from rlens_jax.plans import OPERATORS, Plan, Reduction
from rlens_jax.search.curves import held_out_plans, operator_result, plan_saving
from rlens_jax.search.front import PrefillTime
from rlens_jax.search.objective import comparable, dataset_metric, score_plan
from rlens_jax.search.results import Buckets, Results, Searched, Timing
from rlens_jax.search.search import rank_layers
from tests.toy_search import one_at_a_time

DATASETS = {"pages_read": 0.95, "pages_compare": 0.85, "pages_yesno": 0.92}
SIZES = LayerSizes(width=128, query_width=128, kv_width=64, ffn_width=512)


def layer_costs(num_layers, operator):
    """The cost of reducing each layer: high for early layers, with bumps that a ranking by position misses."""
    layers = np.arange(num_layers)
    bump = np.random.default_rng(OPERATORS.index(operator)).uniform(0, 1, num_layers) ** 3
    return (0.3 * np.exp(-4 * layers / num_layers) + 0.25 * bump) * 12 / num_layers - 0.01 * (layers % 5 == 4)


class World:
    """Outcomes of any plan: a sample is right while the plan's cost is below the sample's tolerance."""

    def __init__(self, num_layers, samples, seed):
        self.costs = {operator: layer_costs(num_layers, operator) for operator in OPERATORS}
        draw = np.random.default_rng(seed)
        self.tolerance = {name: 0.08 + draw.gamma(2.0, 0.5, samples) for name in DATASETS}
        self.right = {name: draw.uniform(size=samples) < share for name, share in DATASETS.items()}

    def outcomes(self, plan):
        cost = sum(self.costs[operator][list(plan.layers(operator))].sum() for operator in OPERATORS)
        return {name: (self.right[name] & (self.tolerance[name] > cost)).astype(float).tolist() for name in DATASETS}

    def metrics(self, plan):
        return {name: dataset_metric(values) for name, values in self.outcomes(plan).items()}


@functools.cache
def synthetic_results(num_layers=12, samples=60, with_search_all=False, operators=OPERATORS, num_random=10, method="greedy"):
    config = RunConfig(
        output="runs/synthetic",
        data=DataConfig("pages", validation_samples=samples, test_samples=samples),
        search=SearchConfig(operators=operators, method=method),
        reduction=Reduction(attention_range=16),
        compute=ComputeConfig(dtype="float32"),
        report=ReportConfig(bootstrap_samples=100, random_rankings=num_random),
    )
    validation, test = World(num_layers, samples, 1), World(num_layers, samples, 2)
    dense_validation, dense_test = validation.metrics(Plan()), test.metrics(Plan())
    score_round = one_at_a_time(lambda plan: score_plan(validation.metrics(plan), dense_validation))

    def flops_saved(plan, with_probes):
        visual = [128] * num_layers
        return saving(SIZES, 24, visual, plan, config.reduction, with_probes=with_probes)

    results = {}
    for operator in operators:
        ranking = rank_layers(num_layers, None, operator, score_round, method=method)
        search_all = rank_layers(num_layers, 0, operator, score_round, method=method) if with_search_all else None
        plans = held_out_plans(ranking, num_random, 0, search_all)
        results[operator] = operator_result(
            ranking,
            {plan: test.outcomes(plan) for plan in plans},
            dense_test,
            flops_saved,
            num_random=num_random,
            seed=0,
            search_all=search_all,
            bootstrap_samples=config.report.bootstrap_samples,
            relative=True,
            images={name: np.arange(samples) + samples * place for place, name in enumerate(DATASETS)},
        )
    combined = None
    if len(operators) == 2:
        plan = Plan(*(results[operator].saving.plan.layers(operator) for operator in OPERATORS))
        combined = plan_saving(plan, test.metrics(plan), dense_test, flops_saved, relative=True)
    prefill = PrefillTime((0.1, 0.12, 0.11), (0.08, 0.07, 0.09), 4000, 3000, 16, 32, 128)
    return Results(
        config=config,
        model_hash="sha256:5f1c",
        data_hash="sha256:77aa",
        num_layers=num_layers,
        buckets=Buckets(((32, 128), (64, 256)), ((512,), (1, 1024)), 0.07),
        versions={"rlens_jax": "0.1.0", "jax": "0.10.2"},
        validation_samples=dict.fromkeys(DATASETS, samples),
        test_samples=dict.fromkeys(DATASETS, samples),
        dense_validation=dense_validation,
        rankings={operator: result.ranking for operator, result in results.items()},
        provisional=False,
        dense_test=dense_test,
        operators=results,
        combined=combined,
        timing=Timing(
            started="2025-01-01T12:00:00+00:00",
            device="cpu",
            num_devices=1,
            num_cores=2,
            peak_memory_bytes=None,
            seconds={"search": 100.0, "curves": 60.0, "timing": 10.0},
            evaluations=500,
            resumed=0,
            compilations=3,
            batch_size=16,
            prefill=dict.fromkeys([*operators, "both"] if combined else operators, prefill),
        ),
    )


def with_bounds(results):
    """The same results, but of each round every second candidate that did not win stopped early."""

    def stopped(round_):
        best, scores = comparable(round_.chosen_score.score), list(round_.scores)
        losers = [place for place, score in enumerate(scores) if comparable(score.score) < best]
        for place in losers[::2]:
            scores[place] = dataclasses.replace(scores[place], bound=True)
        return dataclasses.replace(round_, scores=tuple(scores))

    operators = {}
    for name, result in results.operators.items():
        ranking = dataclasses.replace(result.ranking, rounds=tuple(map(stopped, result.ranking.rounds)))
        operators[name] = dataclasses.replace(result, ranking=ranking)
    rankings = {name: result.ranking for name, result in operators.items()}
    return dataclasses.replace(results, operators=operators, rankings=rankings)


def only_searched(results, provisional, operators=OPERATORS):
    """The same run before its held-out curves, with the rankings of some operators."""
    facts = {field.name: getattr(results, field.name) for field in dataclasses.fields(Searched)}
    rankings = {operator: results.rankings[operator] for operator in operators}
    timing = dataclasses.replace(results.timing, prefill={})
    return Searched(**facts | {"rankings": rankings, "provisional": provisional, "timing": timing})


def with_margin(results, operator, low):
    """The same results, but `operator`'s searched order no better than the others'."""
    old = results.operators[operator]
    margins = {name: dataclasses.replace(value, low=np.array(low)) for name, value in old.margins.items()}
    operators = {**results.operators, operator: dataclasses.replace(old, margins=margins)}
    return dataclasses.replace(results, operators=operators)
