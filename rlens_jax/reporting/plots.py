"""Plots of a finished run, as PNG or SVG bytes; the same results give the same bytes.

The colours, by Okabe and Ito, differ for any colour vision. Line styles and markers differ as well.
"""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, QuadMesh
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from rlens_jax.plans import Operator
from rlens_jax.search.results import ALLOWED_LOSS, OperatorResult, RandomCurves, Results, Strategy
from rlens_jax.search.search import Ranking

Format = Literal["png", "svg"]

OPERATOR_NAMES: dict[Operator, str] = {"attention": "Hollow Attention", "ffn": "Dynamic FFN"}
STRATEGY_NAMES: dict[Strategy, str] = {
    "searched": "searched",
    "search_all": r"searched, no layer by position ($L_p = 0$)",
    "position": "by position, last layer first",
    "random": "random rankings: mean and range",
}
_STYLES: dict[Strategy, dict[str, str]] = {
    "searched": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "search_all": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "position": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "random": {"color": "#6E6E6E", "linestyle": "none", "marker": "D"},
}
_RANKED_GREY = "#DCDCDC"
_SHALLOW = 40
"""Most layers with a marker per point and lines between the cells."""


def plot_curves(results: Results, kind: Format) -> bytes:
    """Held-out score against the number of reduced layers, one panel per operator."""
    return drawn(lambda: _curves(results), kind)


def plot_candidates(results: Results, kind: Format) -> bytes:
    """The score of every candidate of every round of the search, one heat map per operator."""
    return drawn(lambda: _candidates(results), kind)


def drawn(draw: Callable[[], Figure], kind: Format) -> bytes:
    """A figure as bytes."""
    # A fixed salt and no date make SVG files reproducible. Text stays text, so that it can be searched.
    with mpl.rc_context({"svg.hashsalt": "rlens_jax", "svg.fonttype": "none", "font.size": 10}):
        figure, buffer = draw(), io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _curves(results: Results) -> Figure:
    panels = len(results.operators)
    figure = Figure(figsize=(1 + 5.4 * panels, 4.9), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, result in zip(axes, results.operators.values(), strict=True):
        _curve_panel(axis, result, results)
    axes[0].set_ylabel("held-out score, mean over the datasets (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    samples = sum(results.test_samples.values())
    figure.suptitle(
        f"{samples} held-out samples of {len(results.test_samples)} datasets; bands: 95 % bootstrap interval", fontsize=10
    )
    return figure


def _curve_panel(axis: Axes, result: OperatorResult, results: Results) -> None:
    num_layers = results.num_layers
    dense = float(np.mean(list(results.dense_test.values())))
    axis.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="dense model")
    for name, curve in result.curves.items():
        style = _STYLES[name]
        layers, mean = range(num_layers + 1), curve.mean
        axis.fill_between(layers, mean.low, mean.high, color=style["color"], alpha=0.15, linewidth=0)
        axis.plot(
            layers,
            mean.value,
            color=style["color"],
            linestyle=style["linestyle"],
            marker=style["marker"] if num_layers <= _SHALLOW else None,
            markersize=4,
            linewidth=1.8,
            zorder=4 if name == "searched" else 3,
            label=STRATEGY_NAMES[name],
        )
    if result.random.orders:
        _random_marks(axis, result.random)
    number = result.curves["searched"].allowed
    axis.plot(
        number,
        result.curves["searched"].mean.value[number],
        marker="*",
        markersize=17,
        markerfacecolor="#F0E442",
        markeredgecolor="black",
        linestyle="none",
        zorder=5,
        label=f"most layers at less than {100 * ALLOWED_LOSS:g} % loss",
    )
    axis.axvline(number, color="black", linewidth=0.6, alpha=0.5)
    axis.set_title(f"{_title(result.ranking)}: {number} of {num_layers} layers at < {100 * ALLOWED_LOSS:g} % loss")
    axis.set_xlabel("reduced layers")
    axis.set_xlim(-0.02 * num_layers, 1.02 * num_layers)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _title(ranking: Ranking) -> str:
    return OPERATOR_NAMES[ranking.operator] + (", one-shot" if ranking.method == "one_shot" else "")


def _random_marks(axis: Axes, random: RandomCurves) -> None:
    """The mean of the random rankings, with whiskers from the worst to the best."""
    means = np.asarray(random.means)
    middle = means.mean(axis=0)
    axis.errorbar(
        random.num_reduced,
        middle,
        yerr=np.clip([middle - means.min(axis=0), means.max(axis=0) - middle], 0, None),
        fmt=_STYLES["random"]["marker"],
        color=_STYLES["random"]["color"],
        markersize=5,
        capsize=4,
        linewidth=1.2,
        label=STRATEGY_NAMES["random"],
    )


def _candidates(results: Results) -> Figure:
    panels, num_layers = len(results.operators), results.num_layers
    rounds = max(len(result.ranking.rounds) for result in results.operators.values())
    side = min(9.0, max(4.6, 0.3 * num_layers))
    height = 1.4 + side * max(rounds, 3) / num_layers
    figure = Figure(figsize=(1.2 + (side + 0.6) * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    norm = _candidate_norm([_score_table(result, num_layers) for result in results.operators.values()])
    for axis, result in zip(axes, results.operators.values(), strict=True):
        image = _candidate_panel(axis, result, num_layers, norm, cell=72 * side / num_layers)
        axis.set_title(_title(result.ranking))
    axes[0].set_ylabel("round of the search")
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    bar.set_label("candidate's score on validation (0 = dense model)")
    bar.ax.axhline(0, color="black", linewidth=2)
    legend = "circle: chosen in this round; grey: ranked already, or by position"
    if any(result.ranking.stopped_early for result in results.operators.values()):
        legend += "\nhatched: stopped early, when it could not win any more; the colour is an upper bound"
    figure.suptitle(legend, fontsize=10)
    return figure


def _candidate_norm(tables: Sequence[np.ndarray]) -> FuncNorm:
    """Colours by the square root of the distance to the best: good candidates lie close together, bad ones far apart."""
    scores = np.concatenate([table[np.isfinite(table)] for table in tables])
    lowest, highest = float(scores.min(initial=-1e-3)), float(scores.max(initial=0))
    return FuncNorm(
        (lambda score: -np.sqrt(np.maximum(highest - score, 0)), lambda root: highest - root**2), vmin=lowest, vmax=highest
    )


def _candidate_panel(axis: Axes, result: OperatorResult, num_layers: int, norm: FuncNorm, cell: float) -> QuadMesh:
    """One heat map with cells of `cell` points."""
    rounds = result.ranking.rounds
    image = axis.pcolormesh(
        np.arange(num_layers + 1) - 0.5,
        np.arange(len(rounds) + 1) + 0.5,
        np.ma.masked_invalid(_score_table(result, num_layers)),
        cmap=mpl.colormaps["viridis"].with_extremes(bad=_RANKED_GREY),
        norm=norm,
        edgecolors="white",
        linewidth=0.4 if num_layers <= _SHALLOW else 0,
    )
    stopped = [
        Rectangle((layer - 0.5, row + 0.5), 1, 1)
        for row, round_ in enumerate(rounds)
        for layer, score in zip(round_.layers, round_.scores, strict=True)
        if score.bound
    ]
    axis.add_collection(PatchCollection(stopped, facecolor="none", edgecolor="white", linewidth=0, hatch="////"))
    axis.set_facecolor(_RANKED_GREY)
    axis.plot(
        [round_.chosen for round_ in rounds],
        range(1, len(rounds) + 1),
        linestyle="none",
        marker="o",
        markersize=min(7.0, 0.5 * cell),
        markerfacecolor="white",
        markeredgecolor="black",
        markeredgewidth=min(1.0, 0.1 * cell),
    )
    axis.set_ylim(len(rounds) + 0.5, 0.5)
    axis.set_xlim(-0.5, num_layers - 0.5)
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(_ticks(0, num_layers - 1))
    axis.yaxis.set_major_locator(_ticks(1, len(rounds)))
    return image


def _score_table(result: OperatorResult, num_layers: int) -> np.ndarray:
    """Scores [rounds, layers], NaN where a layer was not a candidate."""
    table = np.full((len(result.ranking.rounds), num_layers), np.nan)
    for row, round_ in enumerate(result.ranking.rounds):
        table[row, list(round_.layers)] = [score.score for score in round_.scores]
    return table


def _ticks(first: int, last: int) -> FixedLocator:
    step = max(1, -(-(last - first + 1) // 20))
    return FixedLocator(list(range(first, last + 1, step)))
