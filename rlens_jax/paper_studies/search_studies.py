"""The study `search_methods`: is a one-shot ranking as good as the greedy search, and how much work does it save?

One-shot rankings are sorted by the outcomes of one round, or by the divergence of the answers' distributions from the dense
model's (`rlens_jax.engine.fidelity`). All rank the last L_p layers by position. The work is the number of layers that run per
validation sample if no candidate stops early: seconds would differ between runs, and which ranking comes first would get those
of the round that they share.
"""

from collections.abc import Mapping

import numpy as np

from rlens_jax.config import OneShotBy, SearchMethod
from rlens_jax.paper_studies.layer_studies import TITLES
from rlens_jax.paper_studies.study import Case, Finding, Panel, Study
from rlens_jax.paper_studies.study_bench import Bench, Measured
from rlens_jax.parity.rankings import kendall_tau
from rlens_jax.plans import OPERATORS, Operator
from rlens_jax.search.bootstrap import area_under_curve
from rlens_jax.search.curves import random_points
from rlens_jax.search.search import Ranking, position_ranking, prefix_plans

Method = tuple[SearchMethod, OneShotBy]
GREEDY: Method = ("greedy", "outcome")
_NAMES: Mapping[Method, str] = {
    GREEDY: "greedy search",
    ("one_shot", "outcome"): "one-shot, by the scores of one round",
    ("one_shot", "kl"): "one-shot, by KL to the dense model",
}
_KEYS: Mapping[Method, str] = {GREEDY: "greedy", ("one_shot", "outcome"): "one_shot", ("one_shot", "kl"): "one_shot_kl"}


def search_methods_study(bench: Bench) -> Study:
    """The study `search_methods`. It searches its own orders, whatever order the other studies use."""
    prior = bench.config.search.position_layers
    counts = sorted({0, *random_points(bench.num_layers), bench.num_layers})
    rankings = {operator: {method: bench.search(operator, prior, *method) for method in _NAMES} for operator in OPERATORS}
    cases = {operator: _lines(bench, operator, found, counts) for operator, found in rankings.items()}
    measured = bench.measure("search_methods", [case for lines in cases.values() for line in lines.values() for case in line])
    panels, findings = [], []
    for operator, lines in cases.items():
        orders = {_NAMES[method]: [ranking.order] for method, ranking in rankings[operator].items()}
        series = (
            bench.series(
                name, counts, [[case] for case in line], measured, orders.get(name, [position_ranking(bench.num_layers)])
            )
            for name, line in lines.items()
        )
        panels.append(Panel(TITLES[operator], tuple(series)))
        findings += _findings(bench, rankings[operator], lines, measured, counts)
    return Study(
        name="search_methods",
        question="Does one round of scores rank layers as well as a greedy search?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _lines(bench: Bench, operator: Operator, rankings: Mapping[Method, Ranking], counts: list[int]) -> dict[str, list[Case]]:
    """The cases of each method, and of the order by position, at all numbers of reduced layers."""
    orders = {_NAMES[method]: ranking.order for method, ranking in rankings.items()}
    orders["by position"] = position_ranking(bench.num_layers)
    plans = {name: prefix_plans(operator, order) for name, order in orders.items()}
    return {name: [Case(prefixes[count], bench.plain) for count in counts] for name, prefixes in plans.items()}


def _findings(
    bench: Bench, rankings: Mapping[Method, Ranking], lines: Mapping[str, list[Case]], measured: Measured, counts: list[int]
) -> list[Finding]:
    greedy = rankings[GREEDY]
    operator, prior = greedy.operator, len(greedy.prefix_scores)
    area, points, title = area_under_curve(counts), len(counts), TITLES[operator]

    def margin(metrics: np.ndarray) -> np.ndarray:
        return area(metrics[:, :points]) - area(metrics[:, points:])

    tables = {name: bench.table(measured, [[case] for case in line]) for name, line in lines.items()}
    findings = []
    for name, table in tables.items():
        under = bench.interval(table, area)
        numbers = map(float, (under.value, under.low, under.high))
        findings.append(Finding(f"{operator}_area {name}", f"{title}, {name}: area under the curve", *numbers))
    ours = tables[_NAMES[GREEDY]]
    for method, ranking in rankings.items():
        key, name, theirs = _KEYS[method], _NAMES[method], tables[_NAMES[method]]
        if method != GREEDY:
            if len(greedy.order) - prior > 1:
                tau = kendall_tau(greedy.order[prior:], ranking.order[prior:])
                statement = f"{title}, {name}: Kendall's tau of its order of the searched layers and the greedy one"
                findings.append(Finding(f"{operator}_tau {key}", statement, tau))
            gain = bench.interval({dataset: np.concatenate([ours[dataset], theirs[dataset]]) for dataset in ours}, margin)
            numbers = map(float, (gain.value, gain.low, gain.high))
            statement = f"{title}, {name}: area of the greedy order minus that of this one"
            findings.append(Finding(f"{operator}_margin {key}", statement, *numbers))
        statement = f"{title}, {name}: layers run per validation sample, without early stopping"
        findings.append(Finding(f"{operator}_work {key}", statement, _layers_run(ranking, by_kl=method[1] == "kl")))
    return findings


def _layers_run(ranking: Ranking, *, by_kl: bool) -> int:
    """Layers that run for a sample: all for the base, and from its own layer on for each prefix and candidate; by KL, all for
    the dense model's distributions, too.
    """
    length, by_position = len(ranking.order), range(1, len(ranking.prefix_scores) + 1)
    candidates = (length - layer for round_ in ranking.rounds for layer in round_.layers)
    return length * (1 + by_kl) + sum(by_position) + sum(candidates)
