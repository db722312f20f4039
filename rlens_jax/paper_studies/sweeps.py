"""What a reduced layer may keep: the studies `fraction`, `range` and `probes`.

Half of the layers and all layers, along the searched order. Each value is a variant of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rlens_jax.paper_studies.cases import Case, Variant
from rlens_jax.paper_studies.layers_study import TITLES, first_layers
from rlens_jax.paper_studies.study import Panel, Series, Study
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.plan import Operator, Reduction

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Kept shares of the FFN units (issue: 5 to 50 %); the configured one is added."""

RANGE_PARTS = (64, 32, 16, 8, 4, 2, 1)
"""The attention range is P divided by these."""

PROBE_FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the visual tokens that are probes; 1.0 is all of them."""


def fraction_study(bench: Bench) -> Study:
    """The study `fraction`: how many FFN units visual tokens need."""
    reduction = bench.config.reduction
    values = sorted({*FRACTIONS, float(reduction.active_fraction)})
    return _sweep(
        bench,
        "fraction",
        "ffn",
        values,
        {"": lambda value: replace(reduction, active_fraction=value)},
        question="How many FFN units do visual tokens need?",
        x_label="FFN units kept (%)",
        x_scale="percent",
    )


def range_study(bench: Bench) -> Study:
    """The study `range`: how far back visual tokens must see, from P / 64 to P."""
    reduction, longest = bench.config.reduction, bench.most_visual
    values = range_values(longest)
    return _sweep(
        bench,
        "range",
        "attention",
        values,
        {"": lambda value: replace(reduction, attention_range=int(value))},
        question=f"How many earlier visual tokens must a visual token see? (P = {longest})",
        x_label="attention range R (visual tokens)",
        x_scale="log",
    )


def range_values(longest: int) -> list[int]:
    """The ranges to try for samples of up to `longest` visual tokens, ascending."""
    return sorted({max(1, longest // part) for part in RANGE_PARTS})


def probes_study(bench: Bench) -> Study:
    """The study `probes`: how many probes choose the units, and whether strided or drawn ones choose better."""
    reduction, longest = bench.config.reduction, bench.most_visual
    counts = {fraction: replace(reduction, probe_fraction=fraction) for fraction in PROBE_FRACTIONS}
    values = {varied.probe_count(longest): fraction for fraction, varied in counts.items()}

    def choosing(choice: Literal["strided", "random"]) -> Callable[[float], Reduction]:
        return lambda count: replace(reduction, probe=choice, probe_fraction=values[int(count)])

    return _sweep(
        bench,
        "probes",
        "ffn",
        sorted(values),
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
    """The score at all values, a line for each way to make a reduction of one."""
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
