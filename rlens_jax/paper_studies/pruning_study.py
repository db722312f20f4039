"""Reducing computation or dropping tokens, or both: score against what is left of the prefill's FLOPs."""

from collections.abc import Sequence
from dataclasses import replace

from rlens_jax.paper_studies.cases import Case
from rlens_jax.paper_studies.layers_study import curve_cases, first_layers
from rlens_jax.paper_studies.study import Panel, Study
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.plan import Plan
from rlens_jax.pruning import VTW, FastV, Pruning

SHARES = (0.3, 0.5, 0.7, 0.9)
"""Of the visual tokens that FastV drops after its second layer (published: 30 and 50 %)."""

VTW_QUARTERS = (1, 2, 3)
"""After how many quarters of the layers VTW drops all of them."""


def pruning_study(bench: Bench) -> Study:
    """The study `pruning`: a plan alone, FastV and VTW alone, and each on top of the plan with half of the layers."""
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
