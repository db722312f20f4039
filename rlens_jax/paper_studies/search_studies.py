"""The study `search_methods`: is a one-shot ranking as good as the greedy search, and how much work does it save?

Both rank the last L_p layers by position. The work is the number of layers that run per validation sample if no candidate stops
early: seconds would differ between runs, and which of the two comes first would get those of the round that they share.
"""

from collections.abc import Mapping

import numpy as np

from rlens_jax.config import SearchMethod
from rlens_jax.paper_studies.layer_studies import TITLES
from rlens_jax.paper_studies.study import Case, Finding, Panel, Study
from rlens_jax.paper_studies.study_bench import Bench, Measured
from rlens_jax.parity.rankings import kendall_tau
from rlens_jax.plans import OPERATORS, Operator
from rlens_jax.search.bootstrap import area_under_curve
from rlens_jax.search.curves import random_points
from rlens_jax.search.search import Ranking, position_ranking, prefix_plans

_NAMES: Mapping[SearchMethod, str] = {"greedy": "greedy search", "one_shot": "one-shot, by the scores of one round"}


def search_methods_study(bench: Bench) -> Study:
    """The study `search_methods`. It searches its own orders, whatever order the other studies use."""
    prior = bench.config.search.position_layers
    counts = sorted({0, *random_points(bench.num_layers), bench.num_layers})
    rankings = {operator: {method: bench.search(operator, prior, method) for method in _NAMES} for operator in OPERATORS}
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


def _lines(
    bench: Bench, operator: Operator, rankings: Mapping[SearchMethod, Ranking], counts: list[int]
) -> dict[str, list[Case]]:
    """The cases of each method, and of the order by position, at all numbers of reduced layers."""
    orders = {_NAMES[method]: ranking.order for method, ranking in rankings.items()}
    orders["by position"] = position_ranking(bench.num_layers)
    plans = {name: prefix_plans(operator, order) for name, order in orders.items()}
    return {name: [Case(prefixes[count], bench.plain) for count in counts] for name, prefixes in plans.items()}


def _findings(
    bench: Bench, rankings: Mapping[SearchMethod, Ranking], lines: Mapping[str, list[Case]], measured: Measured, counts: list[int]
) -> list[Finding]:
    greedy, one_shot = rankings["greedy"], rankings["one_shot"]
    operator, prior = greedy.operator, len(greedy.prefix_scores)
    area, points, title = area_under_curve(counts), len(counts), TITLES[operator]

    def margin(metrics: np.ndarray) -> np.ndarray:
        return area(metrics[:, :points]) - area(metrics[:, points:])

    tables = {name: bench.table(measured, [[case] for case in line]) for name, line in lines.items()}
    findings = []
    if len(greedy.order) - prior > 1:
        tau = kendall_tau(greedy.order[prior:], one_shot.order[prior:])
        findings.append(Finding(f"{operator}_tau", f"{title}: Kendall's tau of both orders of the searched layers", tau))
    for name, table in tables.items():
        under = bench.interval(table, area)
        numbers = map(float, (under.value, under.low, under.high))
        findings.append(Finding(f"{operator}_area {name}", f"{title}, {name}: area under the curve", *numbers))
    ours, theirs = (tables[_NAMES[method]] for method in ("greedy", "one_shot"))
    gain = bench.interval({name: np.concatenate([ours[name], theirs[name]]) for name in ours}, margin)
    numbers = map(float, (gain.value, gain.low, gain.high))
    findings.append(
        Finding(f"{operator}_margin", f"{title}: area of the greedy order minus that of the one-shot order", *numbers)
    )
    for method, ranking in rankings.items():
        statement = f"{title}, {_NAMES[method]}: layers run per validation sample, without early stopping"
        findings.append(Finding(f"{operator}_work {method}", statement, _layers_run(ranking)))
    return findings


def _layers_run(ranking: Ranking) -> int:
    """Layers that run for a sample: all for the base, and from its own layer on for each prefix and candidate."""
    length, by_position = len(ranking.order), range(1, len(ranking.prefix_scores) + 1)
    candidates = (length - layer for round_ in ranking.rounds for layer in round_.layers)
    return length + sum(by_position) + sum(candidates)
