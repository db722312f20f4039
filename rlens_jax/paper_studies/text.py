"""Is it visual tokens that are redundant? The same reductions, applied to the text of the prompt instead (simulated).

At half of the layers the relative score lost is compared: text over visual. Both losses are drawn on the same samples.

Two things favour visual tokens beside what they are: the order of layers was searched for them, and the last layer is free for
them (`results.Flops.last_layer`), but not for text, whose last token says the answer.
"""

import math
from collections.abc import Sequence

import numpy as np

from rlens_jax.paper_studies.cases import Case, Variant
from rlens_jax.paper_studies.layers_study import TITLES, curve_cases, orders_of
from rlens_jax.paper_studies.study import Bound, Finding, Panel, Study
from rlens_jax.paper_studies.study_bench import Bench, Measured
from rlens_jax.plan import Plan
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.curves import random_points


def text_study(bench: Bench) -> Study:
    """The study `text`."""
    half = bench.num_layers // 2
    counts = sorted({0, half, *random_points(bench.num_layers), bench.num_layers})
    text = Variant(bench.config.reduction, tokens="text")
    names = {"visual tokens reduced": bench.plain, "prompt text reduced (simulated)": text}
    cases = {
        which: {name: curve_cases(bench, which, variant, counts) for name, variant in names.items()} for which in TITLES
    }
    measured = bench.measure("text", [case for lines in cases.values() for line in lines.values() for case in line])
    panels, findings = [], []
    for which, title in TITLES.items():
        series = tuple(
            bench.series(name, counts, [[case] for case in line], measured, orders_of(bench, which))
            for name, line in cases[which].items()
        )
        panels.append(Panel(title, series))
        visual, control = (line[counts.index(half)] for line in cases[which].values())
        findings += _findings(bench, which, f"{title}, {half} layers", measured, visual, control)
    return Study(
        name="text",
        question="Does reducing the text of the prompt in the same layers cost more than reducing visual tokens?",
        x_label="reduced layers",
        x_scale="linear",
        panels=tuple(panels),
        findings=tuple(findings),
    )


def _findings(bench: Bench, which: str, title: str, measured: Measured, visual: Case, text: Case) -> list[Finding]:
    cases = [[Case(Plan(), bench.plain)], [visual], [text]]
    table = bench.table(measured, cases)

    def losses(metrics: np.ndarray) -> np.ndarray:
        return bench.losses(metrics[:, 1:], metrics[:, :1])

    lost = bench.interval(table, losses)
    angle = bench.interval(table, lambda metrics: ratio_angle(*losses(metrics).T))
    value, low, high = map(ratio_of, _numbers(angle))
    named = zip(("visual", "text"), lost.value, lost.low, lost.high, strict=True)
    return [
        *(
            Finding(f"{which}_{name}_loss", f"{title}: score lost, {name} reduced", *map(float, numbers))
            for name, *numbers in named
        ),
        Finding(
            f"{which}_ratio",
            f"{title} of the order searched for visual tokens: score lost, text over visual",
            value,
            low,
            high,
        ),
    ]


def ratio_angle(visual: np.ndarray, text: np.ndarray) -> np.ndarray:
    """The ratio text / visual of losses as an angle, which stays in order where the visual loss is 0 or a gain.

    Percentiles of the ratio itself would be nonsense there: as the visual loss falls through 0, the ratio jumps from the
    largest to the smallest of all numbers, while the angle goes on through pi / 2. Where neither is lost there is no ratio;
    such draws count as the lowest, which never favours the claim that text costs more.
    """
    return np.where((visual <= 0) & (text <= 0), -math.pi, np.arctan2(text, visual))


def ratio_of(angle: float) -> Bound:
    """The ratio of an angle; "infinite" when only text loses, "undefined" when neither does."""
    if angle >= math.pi / 2:
        return "infinite"
    return math.tan(angle) if angle > -math.pi / 2 else "undefined"


def _numbers(interval: Interval) -> Sequence[float]:
    return [float(bound) for bound in (interval.value, interval.low, interval.high)]
