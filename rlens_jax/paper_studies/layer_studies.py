"""Studies of which layers, and how many, can be reduced: `layers`, `text` and `strategies`.

`layers` plots the score against the number of reduced layers, in the searched order. The step that reduces the last layer is free
(`study.Flops.last_layer`) and is marked.

`text` is the control (simulated): the same reductions on the text of the prompt instead of the visual tokens. It compares the
relative score lost with half of the layers reduced, text over visual, on the same bootstrap draws. Two things favour visual
tokens: the order of layers was searched for them, and the last layer is free for them but not for text, whose last token
predicts the answer.

`strategies` compares orders of layers: searched, hybrid (the last L_p layers by position), by position, random if asked for.
"""

import math
from collections.abc import Sequence

import numpy as np

from rlens_jax.paper_studies.study import Bound, Case, Finding, Panel, Series, Study, Variant
from rlens_jax.paper_studies.study_bench import Bench, Measured
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.search.bootstrap import area_under_curve
from rlens_jax.search.curves import random_points, random_rankings
from rlens_jax.search.results import ALLOWED_LOSS
from rlens_jax.search.search import position_ranking, prefix_plans

TITLES = {"attention": "Hollow Attention", "ffn": "Dynamic FFN", "both": "both: the first k of each order"}


def first_layers(bench: Bench, which: str, count: int) -> Plan:
    """The plan that reduces the first `count` layers of the searched order of one operator, or of each ("both")."""
    layers = {operator: bench.order(operator)[:count] if which in (operator, "both") else () for operator in OPERATORS}
    return Plan(layers["attention"], layers["ffn"])


def curve_cases(bench: Bench, which: str, variant: Variant, counts: Sequence[int]) -> list[Case]:
    """One case per number of reduced layers."""
    return [Case(first_layers(bench, which, count), variant) for count in counts]


def layers_study(bench: Bench) -> Study:
    """The study `layers`."""
    counts = range(bench.num_layers + 1)
    cases = {which: curve_cases(bench, which, bench.plain, counts) for which in TITLES}
    measured = bench.measure("layers", [case for group in cases.values() for case in group])
    panels, findings = [], []
    for which, title in TITLES.items():
        orders = _orders_behind(bench, which)
        series = bench.series("searched order", counts, [[case] for case in cases[which]], measured, orders)
        panels.append(Panel(title, (series,), free=_free_step(orders)))
        findings += _layers_findings(which, title, series)
    return Study(
        name="layers",
        question="How many layers can do without full visual computation?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _orders_behind(bench: Bench, which: str) -> list[tuple[int, ...]]:
    """The orders of layers that `first_layers` uses."""
    return [bench.order(operator) for operator in OPERATORS if which in (operator, "both")]


def _free_step(orders: Sequence[Sequence[int]]) -> tuple[float, float] | None:
    """The step that reduces the last layer and no other; None if it differs between the orders."""
    places = {order.index(len(order) - 1) for order in orders}
    return (float(min(places)), float(min(places) + 1)) if len(places) == 1 else None


def _layers_findings(which: str, title: str, series: Series) -> list[Finding]:
    allowed = max(point.x for point in series.points if point.x == 0 or point.loss < ALLOWED_LOSS)
    point = next(point for point in series.points if point.x == allowed)
    assert point.flops is not None
    return [
        Finding(
            f"{which}_layers", f"{title}: the largest number of layers with less than {100 * ALLOWED_LOSS:g} % loss", allowed
        ),
        Finding(f"{which}_flops_saved", f"{title}: share of the prefill's FLOPs saved there", point.flops.saved),
        Finding(
            f"{which}_flops_saved_free",
            f"{title}: the part of it in the last layer, which any implementation has for free",
            point.flops.last_layer,
        ),
    ]


def text_study(bench: Bench) -> Study:
    """The study `text`."""
    half = bench.num_layers // 2
    counts = sorted({0, half, *random_points(bench.num_layers), bench.num_layers})
    text = Variant(bench.config.reduction, tokens="text")
    names = {"visual tokens reduced": bench.plain, "prompt text reduced (simulated)": text}
    cases = {which: {name: curve_cases(bench, which, variant, counts) for name, variant in names.items()} for which in TITLES}
    measured = bench.measure("text", [case for lines in cases.values() for line in lines.values() for case in line])
    panels, findings = [], []
    for which, title in TITLES.items():
        series = tuple(
            bench.series(name, counts, [[case] for case in line], measured, _orders_behind(bench, which))
            for name, line in cases[which].items()
        )
        panels.append(Panel(title, series))
        visual, control = (line[counts.index(half)] for line in cases[which].values())
        findings += _text_findings(bench, which, f"{title}, {half} layers", measured, visual, control)
    return Study(
        name="text",
        question="Does reducing the text of the prompt in the same layers cost more than reducing visual tokens?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _text_findings(bench: Bench, which: str, title: str, measured: Measured, visual: Case, text: Case) -> list[Finding]:
    cases = [[Case(Plan(), bench.plain)], [visual], [text]]
    table = bench.table(measured, cases)

    def losses(metrics: np.ndarray) -> np.ndarray:
        return bench.losses(metrics[:, 1:], metrics[:, :1])

    lost = bench.interval(table, losses)
    angle = bench.interval(table, lambda metrics: ratio_angle(*losses(metrics).T))
    value, low, high = (ratio_of(float(bound)) for bound in (angle.value, angle.low, angle.high))
    named = zip(("visual", "text"), lost.value, lost.low, lost.high, strict=True)
    return [
        *(
            Finding(f"{which}_{name}_loss", f"{title}: score lost, {name} reduced", *map(float, numbers))
            for name, *numbers in named
        ),
        Finding(
            f"{which}_ratio", f"{title} of the order searched for visual tokens: score lost, text over visual", value, low, high
        ),
    ]


def ratio_angle(visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The ratio text / visual of losses as an angle, which is monotonic even where the visual loss is 0 or negative.

    Percentiles of the ratio itself would mean nothing: as the visual loss falls through 0, the ratio jumps from +infinity to
    -infinity, while the angle passes through pi / 2. If neither loses anything, there is no ratio; such draws count as the
    lowest angle, which never favours the claim that text costs more.
    """
    return np.where((visual <= 0) & (text <= 0), -math.pi, np.arctan2(text, visual))


def ratio_of(angle: float) -> Bound:
    """The ratio of an angle: "infinite" if only text loses, "undefined" if neither loses."""
    if angle >= math.pi / 2:
        return "infinite"
    return math.tan(angle) if angle > -math.pi / 2 else "undefined"


def strategies_study(bench: Bench) -> Study:
    """The study `strategies`. It searches its own orders, per L_p, whatever order the other studies use."""
    length = bench.num_layers
    counts = sorted({0, *random_points(length), length})
    orders = {operator: _strategies(bench, operator) for operator in OPERATORS}
    cases = {
        operator: {name: _strategy_cases(bench, operator, group, counts) for name, group in strategies.items()}
        for operator, strategies in orders.items()
    }
    flat = [case for lines in cases.values() for line in lines.values() for group in line for case in group]
    measured = bench.measure("strategies", flat)
    panels, findings = [], []
    for operator, lines in cases.items():
        series = tuple(bench.series(name, counts, line, measured, orders[operator][name]) for name, line in lines.items())
        panels.append(Panel(TITLES[operator], series))
        findings += _strategies_findings(bench, operator, lines, measured, counts)
    return Study(
        name="strategies",
        question="Which order of layers is best: searched, by position, both, or any?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _strategies(bench: Bench, operator: Operator) -> dict[str, list[tuple[int, ...]]]:
    """The orders of each strategy: one, or several to average over."""
    length, report = bench.num_layers, bench.config.report
    hybrids = sorted({length // 4, length // 2, 3 * length // 4} - {0, length})
    drawn = random_rankings(length, report.random_rankings, bench.config.seed)
    return {
        "searched": [bench.search(operator, 0).order],
        **{f"hybrid, L_p = {prior}": [bench.search(operator, prior).order] for prior in hybrids},
        "by position": [position_ranking(length)],
        **({f"random, mean of {len(drawn)}": drawn} if drawn else {}),
    }


def _strategy_cases(bench: Bench, operator: Operator, orders: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[Case]]:
    """Per number of reduced layers, one case per order."""
    prefixes = [prefix_plans(operator, order) for order in orders]
    return [[Case(plans[count], bench.plain) for plans in prefixes] for count in counts]


def _strategies_findings(
    bench: Bench, operator: Operator, lines: dict[str, list[list[Case]]], measured: Measured, counts: Sequence[int]
) -> list[Finding]:
    """The area under each curve, and how much larger that of the searched order is on the same draws."""
    area, points = area_under_curve(counts), len(counts)

    def margin(metrics: np.ndarray) -> np.ndarray:
        return area(metrics[:, :points]) - area(metrics[:, points:])

    findings = []
    for name, line in lines.items():
        title = f"{TITLES[operator]}, {name}"
        under = bench.interval(bench.table(measured, line), area)
        numbers = map(float, (under.value, under.low, under.high))
        findings.append(Finding(f"{operator}_area {name}", f"{title}: area under the curve", *numbers))
        if name != "searched":
            gain = bench.interval(bench.table(measured, [*lines["searched"], *line]), margin)
            numbers = map(float, (gain.value, gain.low, gain.high))
            statement = f"{title}: area of the searched order minus this"
            findings.append(Finding(f"{operator}_margin {name}", statement, *numbers))
    return findings
