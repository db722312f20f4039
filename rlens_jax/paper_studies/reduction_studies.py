"""Studies of what a reduced layer computes: `fraction`, `range`, `probes` and `pruning`.

The first three vary one field of the reduction, with half of the layers and with all layers reduced along the searched order.
`pruning` compares the reductions with dropping tokens, and combines both; its x axis is the rest of the prefill's FLOPs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rlens_jax.paper_studies.layer_studies import TITLES, curve_cases, first_layers
from rlens_jax.paper_studies.study import Case, Panel, Series, Study, Variant
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.plans import Operator, Plan, Reduction
from rlens_jax.pruning import VTW, FastV, Pruning

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Kept shares of the FFN units; the configured share is added."""

RANGE_PARTS = (64, 32, 16, 8, 4, 2, 1)
"""The attention range R is P divided by each of these."""

PROBE_FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the visual tokens that are probes; 1.0 is all of them."""

SHARES = (0.3, 0.5, 0.7, 0.9)
"""Shares of the visual tokens that FastV drops after its second layer (published: 30 and 50 %)."""

VTW_QUARTERS = (1, 2, 3)
"""VTW drops all visual tokens after so many quarters of the layers."""


def fraction_study(bench: Bench) -> Study:
    """The study `fraction`: how many FFN units visual tokens need."""
    reduction = bench.config.reduction
    return _sweep(
        bench,
        "fraction",
        "ffn",
        sorted({*FRACTIONS, float(reduction.active_fraction)}),
        {"": lambda value: replace(reduction, active_fraction=value)},
        question="How many FFN units do visual tokens need?",
        x_label="FFN units kept (%)",
        x_scale="percent",
    )


def range_study(bench: Bench) -> Study:
    """The study `range`: how far back visual tokens must see, from P / 64 to P."""
    reduction, longest = bench.config.reduction, bench.most_visual
    return _sweep(
        bench,
        "range",
        "attention",
        range_values(longest),
        {"": lambda value: replace(reduction, attention_range=int(value))},
        question=f"How many earlier visual tokens must a visual token see? (P = {longest})",
        x_label="attention range R (visual tokens)",
        x_scale="log",
    )


def range_values(longest: int) -> list[int]:
    """The ranges to try for samples of up to `longest` visual tokens, ascending."""
    return sorted({max(1, longest // part) for part in RANGE_PARTS})


def probes_study(bench: Bench) -> Study:
    """The study `probes`: how many probes choose the units, and whether strided or random probes choose better."""
    reduction, longest = bench.config.reduction, bench.most_visual
    fractions = {replace(reduction, probe_fraction=fraction).probe_count(longest): fraction for fraction in PROBE_FRACTIONS}

    def choosing(choice: Literal["strided", "random"]) -> Callable[[float], Reduction]:
        return lambda count: replace(reduction, probe=choice, probe_fraction=fractions[int(count)])

    return _sweep(
        bench,
        "probes",
        "ffn",
        sorted(fractions),
        {"strided": choosing("strided"), "random": choosing("random")},
        question=f"How many probes choose the FFN units, and which? (P = {longest})",
        x_label="probes M (visual tokens)",
        x_scale="log",
    )


def _sweep(
    bench: Bench,
    name: str,
    operator: Operator,
    values: Sequence[float],
    reductions: Mapping[str, Callable[[float], Reduction]],
    *,
    question: str,
    x_label: str,
    x_scale: Literal["percent", "log"],
) -> Study:
    """The score at all values, with one line per number of layers and per way to make a reduction of a value."""
    counts = [bench.num_layers // 2, bench.num_layers]
    cases = {
        (count, choice): [Case(first_layers(bench, operator, count), Variant(make(value))) for value in values]
        for count in counts
        for choice, make in reductions.items()
    }
    measured = bench.measure(name, [case for line in cases.values() for case in line])

    def line(count: int, choice: str) -> Series:
        label = ", ".join(filter(None, [f"{count} of {bench.num_layers} layers", choice]))
        return bench.series(label, values, [[case] for case in cases[count, choice]], measured)

    series = tuple(line(count, choice) for count in counts for choice in reductions)
    return Study(name, question, x_label, x_scale, (Panel(TITLES[operator], series),), ())


def pruning_study(bench: Bench) -> Study:
    """The study `pruning`: plans alone, FastV and VTW alone, and each on top of the plan with half of the layers."""
    length = bench.num_layers
    half = first_layers(bench, "both", length // 2)
    fastv = [FastV(layer=2, share=share) for share in SHARES]
    vtw = [VTW(layer=layer) for layer in sorted({max(1, length * part // 4) for part in VTW_QUARTERS})]
    lines = {
        "both reductions, first k layers": curve_cases(bench, "both", bench.plain, range(length + 1)),
        "FastV after layer 2": _pruned(bench, Plan(), fastv),
        "VTW": _pruned(bench, Plan(), vtw),
        f"both, {length // 2} layers, and FastV": _pruned(bench, half, fastv),
        f"both, {length // 2} layers, and VTW": _pruned(bench, half, vtw),
    }
    measured = bench.measure("pruning", [case for line in lines.values() for case in line])
    series = []
    for name, line in lines.items():
        left = {case: 1 - bench.flops(case).saved for case in line}
        cases = sorted(line, key=lambda case: left[case])
        series.append(bench.series(name, [left[case] for case in cases], [[case] for case in cases], measured))
    return Study(
        name="pruning",
        question="Fewer tokens, less computation for each, or both?",
        x_label="FLOPs of the prefill, without probes (% of dense)",
        x_scale="percent",
        panels=(Panel("token pruning and reductions", tuple(series)),),
        findings=(),
    )


def _pruned(bench: Bench, plan: Plan, prunings: Sequence[Pruning]) -> list[Case]:
    return [Case(plan, replace(bench.plain, pruning=pruning)) for pruning in prunings]
