"""`report.html`: the values of one or several runs, prepared for the template, which only lays them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml

from rlens_jax.errors import UserError
from rlens_jax.files import json_leaves
from rlens_jax.plans import OPERATORS, Plan
from rlens_jax.reporting import chart
from rlens_jax.reporting.chart import Chart, HeatMap, Mark, Series, curve_chart, heat_map, worst_score
from rlens_jax.reporting.front_report import front_section
from rlens_jax.reporting.measure_text import measure_of
from rlens_jax.reporting.page_parts import asset, content_hash, environment, percent
from rlens_jax.reporting.report_text import METHODS, ONE_SHOT, TITLES
from rlens_jax.reporting.run_files import RunFiles
from rlens_jax.reporting.seen_section import seen_section
from rlens_jax.search.results import ALLOWED_LOSS

MAX_BYTES = 3_000_000
MAX_RUNS = 8
"""The number of colours that are easy to tell apart."""

_DEEP = 32
"""Heat maps with more layers take the whole width and have small cells."""
_OPERATORS: dict[str, str] = {operator: TITLES[operator] for operator in OPERATORS}
_PLANS = {**_OPERATORS, "both": TITLES["both"].capitalize()}
_STRATEGIES = {
    "searched": ("searched", "searched"),
    "search_all": ("searched, no layer by position", "no prior"),
    "position": ("by position, last layer first", "by position"),
    "random": ("random, mean of the rankings", "random"),
}
"""Strategy -> (name in the table of areas, name in the chart)."""


@dataclass(frozen=True)
class SavingRow:
    """A plan in the table of savings; times in seconds, None when they were not measured."""

    name: str
    layers: str
    loss: float
    flops: float
    flops_with_probes: float
    dense: float | None
    reduced: float | None
    time_saved: float | None
    largest_divergence: float | None


@dataclass(frozen=True)
class LayerCell:
    """A layer with its rank (from 1); `lost` if the operator's saving reduces it."""

    layer: int
    rank: int
    lost: bool


@dataclass(frozen=True)
class OperatorView:
    """One operator of a run."""

    name: str
    title: str
    order: tuple[LayerCell, ...]
    how: str
    by_position: int
    layers: tuple[LayerCell, ...]
    heat: HeatMap
    held_out: "HeldOutView | None"
    """None without held-out curves."""


@dataclass(frozen=True)
class HeldOutView:
    """The curves of an operator."""

    allowed: int
    chart: Chart
    areas: tuple[tuple[str, Mapping[str, float], Mapping[str, float] | None], ...]
    rivals: str
    unbeaten: str


@dataclass(frozen=True)
class RunView:
    """The section of a run."""

    letter: str
    name: str
    files: RunFiles
    operators: tuple[OperatorView, ...]
    savings: tuple[SavingRow, ...]
    timed: Mapping[str, Any] | None
    configuration: str
    example_plan: str
    front: str
    """The section of the best plan under a budget, as HTML; empty without one."""
    seen: str
    """The section of single samples, as HTML; empty without them."""


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side: one chart per operator, and the fields of the configuration that differ."""

    charts: tuple[tuple[str, Chart], ...]
    differences: tuple[tuple[str, tuple[str, ...]], ...]


def report_html(runs: Sequence[RunFiles]) -> str:
    """The whole page, a single file.

    Raises:
        UserError: there are more than `MAX_RUNS` runs, or several that make more than `MAX_BYTES`, or one of several without
            held-out curves.
    """
    if len(runs) > MAX_RUNS:
        raise UserError(f"a report shows at most {MAX_RUNS} runs side by side, not {len(runs)}")
    for run in runs:
        if len(runs) > 1 and "held_out" not in run.ranking:
            raise UserError(f"{run.name} has no held-out curves to compare; finish its run, or report it alone")
    views = [_run_view(run, letter) for run, letter in zip(runs, "ABCDEFGH", strict=False)]
    style = asset("report.css") + "".join(map(_heat_width, sorted({run.num_layers for run in runs})))
    script = asset("report.js")
    template = environment().get_template("report.html.jinja")
    page = template.render(
        runs=views,
        comparison=_comparison(views) if len(views) > 1 else None,
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        area=chart,
        deep_from=_DEEP,
        allowed_loss=ALLOWED_LOSS,
    )
    size = len(page.encode())
    if size > MAX_BYTES and len(runs) > 1:  # write_examples bounds the size of one run
        raise UserError(f"the report would have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}; name fewer runs")
    return page


def _heat_width(num_layers: int) -> str:
    """A CSS rule for the least width of a heat map; narrower windows scroll it. The page's policy forbids style attributes."""
    column = 0.75 if num_layers > _DEEP else 1.25
    return f".depth-{num_layers} {{ min-width: {3 + column * num_layers:g}rem; }}\n"


def _run_view(run: RunFiles, letter: str) -> RunView:
    ranking, prefill = run.ranking, run.timing["prefill"]
    worst = worst_score(ranking["search"])
    return RunView(
        letter=letter,
        name=run.name,
        files=run,
        operators=tuple(_operator_view(run, name, worst) for name in ranking["rankings"]),
        savings=tuple(_saving_row(name, saving, prefill.get(name)) for name, saving in ranking.get("savings", {}).items()),
        timed=next(iter(prefill.values()), None),
        configuration=yaml.safe_dump(ranking["configuration"], sort_keys=False, allow_unicode=True),
        example_plan="" if run.examples is None else Plan(**run.examples["plan"]).label(),
        front="" if run.front is None else front_section(run.front),
        seen="" if run.seen is None else seen_section(run.seen),
    )


def _saving_row(name: str, saving: Mapping[str, Any], time: Mapping[str, Any] | None) -> SavingRow:
    dense, reduced = (median(time[side]) if time else None for side in ("dense", "reduced"))
    return SavingRow(
        name=_PLANS[name],
        layers=Plan(**saving["plan"]).label(),
        loss=saving["loss"],
        flops=saving["flops_saved"],
        flops_with_probes=saving["flops_saved_with_probes"],
        dense=dense,
        reduced=reduced,
        time_saved=None if dense is None or reduced is None else 1 - reduced / dense,
        largest_divergence=saving.get("largest_divergence"),
    )


def _operator_view(run: RunFiles, operator: str, worst: float) -> OperatorView:
    ranking = run.ranking
    order, search, evaluated = ranking["rankings"][operator], ranking["search"][operator], "held_out" in ranking
    lost = ranking["savings"][operator]["plan"][operator] if evaluated else ()
    method = search.get("method", "greedy")
    ranks = {layer: rank for rank, layer in enumerate(order, 1)}
    layers = tuple(LayerCell(layer, ranks[layer], layer in lost) for layer in sorted(order))
    return OperatorView(
        name=operator,
        title=_OPERATORS[operator] + (ONE_SHOT if method == "one_shot" else ""),
        how=METHODS[method],
        order=tuple(layers[layer] for layer in order),
        by_position=search["position_layers"],
        layers=layers,
        heat=heat_map(search, run.num_layers, worst, measure_of(ranking["configuration"]["search"])),
        held_out=_held_out_view(run, operator) if evaluated else None,
    )


def _held_out_view(run: RunFiles, operator: str) -> HeldOutView:
    held_out = run.ranking["held_out"][operator]
    areas, margins = held_out["areas"], held_out["margins"]
    rivals = [name for name in ("position", "random") if name in margins]
    unbeaten = [name for name in rivals if margins[name]["low"] <= 0]
    return HeldOutView(
        allowed=_allowed(held_out["curves"]["searched"]),
        chart=_run_chart(run, operator),
        areas=tuple((_STRATEGIES[name][0], areas[name], margins.get(name)) for name in _STRATEGIES if name in areas),
        rivals=" and ".join(rivals),
        unbeaten=" and ".join(unbeaten),
    )


def _dense(run: RunFiles) -> float:
    """The held-out score of the dense model, mean over the datasets."""
    metrics = run.ranking["dense"]["test"].values()
    return sum(metrics) / len(metrics)


def _allowed(curve: Mapping[str, Any]) -> int:
    """The largest number of reduced layers with a loss below `ALLOWED_LOSS`."""
    return max(p["num_reduced"] for p in curve["points"] if not p["num_reduced"] or p["loss"] < ALLOWED_LOSS)


def _run_chart(run: RunFiles, operator: str) -> Chart:
    held_out = run.ranking["held_out"][operator]
    curves, random = held_out["curves"], held_out["random"]
    means = list(zip(*(ranking["means"] for ranking in random["rankings"]), strict=True))
    series = (
        []
        if not means
        else [
            Series(
                name=_STRATEGIES["random"][1],
                label=_STRATEGIES["random"][1],
                style="random",
                x=tuple(map(float, random["num_reduced"])),
                y=tuple(sum(values) / len(values) for values in means),
                low=tuple(map(min, means)),
                high=tuple(map(max, means)),
                notes=("",) * len(means),
                joined=False,
            )
        ]
    )
    series += [_curve_series(curves[name], name) for name in ("position", "search_all", "searched") if name in curves]
    searched = curves["searched"]["points"]
    allowed = _allowed(curves["searched"])
    return curve_chart(
        f"{_OPERATORS[operator]}: held-out score against the number of reduced layers",
        series,
        [Mark(allowed, searched[allowed]["mean"], "searched")],
        x_end=run.num_layers,
        x_title="reduced layers",
        y_title="held-out score, %",
        step_title=f"{{x}} of {run.num_layers} layers reduced",
        reference=_dense(run),
    )


def _curve_series(curve: Mapping[str, Any], strategy: str) -> Series:
    points, order = curve["points"], curve["order"]
    added = ["", *(f"layer {layer} last" for layer in order)]
    return Series(
        name=_STRATEGIES[strategy][1],
        label=_STRATEGIES[strategy][1],
        style=strategy.replace("_", "-"),
        x=tuple(float(point["num_reduced"]) for point in points),
        **_band(points, 1.0),
        notes=tuple(_note(point, text) for point, text in zip(points, added, strict=True)),
    )


def _note(point: Mapping[str, float], more: str) -> str:
    loss = f"loss {percent(point['loss'])}"
    return f"{loss}, {more}" if more else loss


def _band(points: Sequence[Mapping[str, float]], unit: float) -> dict[str, Any]:
    names = {"y": "mean", "low": "low", "high": "high"}
    return {key: tuple(point[name] / unit for point in points) for key, name in names.items()}


def _comparison(runs: Sequence[RunView]) -> Comparison:
    leaves = [json_leaves(dict(run.files.ranking["configuration"])) for run in runs]
    fields = dict.fromkeys(name for leaf in leaves for name in leaf)
    values = {name: tuple(leaf.get(name, "not set") for leaf in leaves) for name in fields}
    ranked = {name: [run for run in runs if name in run.files.ranking["rankings"]] for name in _OPERATORS}
    return Comparison(
        charts=tuple((_OPERATORS[name], _comparison_chart(members, name)) for name, members in ranked.items() if members),
        differences=tuple((name, texts) for name, texts in values.items() if len(set(texts)) > 1),
    )


def _comparison_chart(runs: Sequence[RunView], operator: str) -> Chart:
    """The searched curves of all runs, each relative to its own dense score.

    Runs with different numbers of layers share an axis in percent of the layers.
    """
    same = len({run.files.num_layers for run in runs}) == 1
    series, marks = [], []
    for run in reversed(runs):  # the first run is in front
        curve = run.files.ranking["held_out"][operator]["curves"]["searched"]
        points, num_layers = curve["points"], run.files.num_layers
        unit = _dense(run.files) or 1.0
        scale = 1.0 if same else 100 / num_layers
        allowed = _allowed(curve)
        series.append(
            Series(
                name=f"{run.letter} {run.name}",
                label=run.letter,
                style=f"run-{run.letter}",
                x=tuple(point["num_reduced"] * scale for point in points),
                **_band(points, unit),
                notes=tuple(_note(point, "" if same else f"{point['num_reduced']} layers") for point in points),
            )
        )
        marks.append(Mark(allowed * scale, points[allowed]["mean"] / unit, f"run-{run.letter}"))
    return curve_chart(
        f"{_OPERATORS[operator]}: score relative to the dense model's, of all runs",
        series,
        marks,
        x_end=runs[0].files.num_layers if same else 100,
        x_title="reduced layers" if same else "reduced layers, % of all",
        y_title="share of the dense score, %",
        step_title="{x} layers reduced" if same else "{x} % of the layers reduced",
        reference=1.0,
    )
