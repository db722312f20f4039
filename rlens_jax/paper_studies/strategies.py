"""Is the search worth it? Orders of layers: searched, hybrid (the last L_p by position), by position alone, and random."""

from collections.abc import Sequence

import numpy as np

from rlens_jax.paper_studies.cases import Case
from rlens_jax.paper_studies.layers_study import TITLES
from rlens_jax.paper_studies.study import Finding, Panel, Study
from rlens_jax.paper_studies.study_bench import Bench, Measured
from rlens_jax.plan import OPERATORS, Operator
from rlens_jax.search.bootstrap import area_under_curve
from rlens_jax.search.curves import random_points
from rlens_jax.search.search import position_ranking, prefix_plans, random_rankings

Orders = dict[str, list[tuple[int, ...]]]
"""Strategy -> the orders that it stands for; several for the mean of random ones."""


def strategies_study(bench: Bench) -> Study:
    """The study `strategies`. Whatever order the other studies use, this one searches itself, for each L_p."""
    length = bench.num_layers
    counts = sorted({0, *random_points(length), length})
    orders = {operator: _orders(bench, operator) for operator in OPERATORS}
    cases = {
        operator: {name: _cases(bench, operator, group, counts) for name, group in strategies.items()}
        for operator, strategies in orders.items()
    }
    flat = [case for lines in cases.values() for line in lines.values() for group in line for case in group]
    measured = bench.measure("strategies", flat)
    panels, findings = [], []
    for operator, lines in cases.items():
        series = tuple(
            bench.series(name, counts, line, measured, orders[operator][name]) for name, line in lines.items()
        )
        panels.append(Panel(TITLES[operator], series))
        findings += _findings(bench, operator, lines, measured, counts)
    return Study(
        name="strategies",
        question="Which order of layers is best: searched, by position, both, or any?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _orders(bench: Bench, operator: Operator) -> Orders:
    length, report = bench.num_layers, bench.config.report
    hybrids = sorted({length // 4, length // 2, 3 * length // 4} - {0, length})
    return {
        "searched": [bench.search(operator, 0).order],
        **{f"hybrid, L_p = {prior}": [bench.search(operator, prior).order] for prior in hybrids},
        "by position": [position_ranking(length)],
        f"random, mean of {report.random_rankings}": random_rankings(length, report.random_rankings, bench.config.seed),
    }


def _cases(
    bench: Bench, operator: Operator, orders: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[list[Case]]:
    """For each number of reduced layers, a case of each order."""
    prefixes = [prefix_plans(operator, order) for order in orders]
    return [[Case(plans[count], bench.plain) for plans in prefixes] for count in counts]


def _findings(
    bench: Bench,
    operator: Operator,
    lines: dict[str, list[list[Case]]],
    measured: Measured,
    counts: Sequence[int],
) -> list[Finding]:
    """Areas under the curves, and what the search gains over each other strategy on the same draws."""
    area, points = area_under_curve(counts), len(counts)
    searched = lines["searched"]
    findings = []
    for name, line in lines.items():

        def margin(metrics: np.ndarray) -> np.ndarray:
            return area(metrics[:, :points]) - area(metrics[:, points:])

        own = bench.interval(bench.table(measured, line), area)
        title = f"{TITLES[operator]}, {name}"
        findings.append(
            Finding(
                f"{operator}_area {name}",
                f"{title}: area under the curve",
                float(own.value),
                float(own.low),
                float(own.high),
            )
        )
        if name != "searched":
            gain = bench.interval(bench.table(measured, [*searched, *line]), margin)
            findings.append(
                Finding(
                    f"{operator}_margin {name}",
                    f"{title}: area of the searched order minus this",
                    float(gain.value),
                    float(gain.low),
                    float(gain.high),
                )
            )
    return findings
