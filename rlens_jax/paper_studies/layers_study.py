"""How many layers can be reduced: score against the number of reduced layers, in the searched order.

The step that reduces the last layer is free (see `results.Flops.last_layer`) and is shown apart.
"""

from collections.abc import Sequence

from rlens_jax.paper_studies.cases import Case, Variant
from rlens_jax.paper_studies.study import Finding, Panel, Series, Study
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.plan import OPERATORS, Plan
from rlens_jax.search.results import ALLOWED_LOSS

TITLES = {
    "attention": "Hollow Attention",
    "ffn": "Dynamic FFN",
    "both": "both: the first k of each order",
}


def first_layers(bench: Bench, which: str, count: int) -> Plan:
    """The plan that reduces the first `count` layers of the searched order of one operator, or of each ("both")."""
    layers = {operator: bench.order(operator)[:count] if which in (operator, "both") else () for operator in OPERATORS}
    return Plan(layers["attention"], layers["ffn"])


def curve_cases(bench: Bench, which: str, variant: Variant, counts: Sequence[int]) -> list[Case]:
    """One case for each number of reduced layers."""
    return [Case(first_layers(bench, which, count), variant) for count in counts]


def orders_of(bench: Bench, which: str) -> list[tuple[int, ...]]:
    """The orders of layers behind `first_layers`."""
    return [bench.order(operator) for operator in OPERATORS if which in (operator, "both")]


def layers_study(bench: Bench) -> Study:
    """The study `layers`."""
    counts = range(bench.num_layers + 1)
    cases = {which: curve_cases(bench, which, bench.plain, counts) for which in TITLES}
    measured = bench.measure("layers", [case for group in cases.values() for case in group])
    panels, findings = [], []
    for which, title in TITLES.items():
        orders = orders_of(bench, which)
        series = bench.series("searched order", counts, [[case] for case in cases[which]], measured, orders)
        panels.append(Panel(title, (series,), free=_free_step(orders)))
        findings += _findings(which, title, series)
    return Study(
        name="layers",
        question="How many layers can do without full visual computation?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _free_step(orders: Sequence[Sequence[int]]) -> tuple[float, float] | None:
    """The step at which the last layer, and no other, is reduced in all orders."""
    places = {order.index(len(order) - 1) for order in orders}
    return (float(min(places)), float(min(places) + 1)) if len(places) == 1 else None


def _findings(which: str, title: str, series: Series) -> list[Finding]:
    allowed = max(point.x for point in series.points if point.x == 0 or point.loss < ALLOWED_LOSS)
    point = next(point for point in series.points if point.x == allowed)
    assert point.flops is not None
    return [
        Finding(
            f"{which}_layers",
            f"{title}: the largest number of layers with less than {100 * ALLOWED_LOSS:g} % loss",
            allowed,
        ),
        Finding(f"{which}_flops_saved", f"{title}: share of the prefill's FLOPs saved there", point.flops.saved),
        Finding(
            f"{which}_flops_saved_free",
            f"{title}: the part of it in the last layer, which any implementation has for free",
            point.flops.last_layer,
        ),
    ]
