"""The plot of a study, as PNG or SVG bytes: panels side by side, score on the y axis."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from rlens_jax.paper_studies.study import Facts, Panel, Study
from rlens_jax.reporting.plots import Format, drawn

# Okabe and Ito's colours, which people with any colour vision can distinguish; line and marker differ, too.
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", "--", "v"),
    ("#56B4E9", "-.", "P"),
    ("#6E6E6E", ":", "X"),
)


def plot_study(study: Study, facts: Facts, kind: Format) -> bytes:
    """Plot all panels of a study."""
    return drawn(lambda: _figure(study, facts), kind)


def _figure(study: Study, facts: Facts) -> Figure:
    count = len(study.panels)
    figure = Figure(figsize=(max(6.4, 1 + 4.4 * count), 4.9), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, study.panels, strict=True):
        _panel(axis, panel, study, facts)
    axes[0].set_ylabel("held-out score, mean over the datasets (%)")
    legend = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, frameon=False)
    samples = sum(facts.samples.values())
    figure.suptitle(f"{study.question}\n{samples} held-out samples; bands: 95 % bootstrap interval", fontsize=10)
    return figure


def _panel(axis: Axes, panel: Panel, study: Study, facts: Facts) -> None:
    axis.axhline(sum(facts.dense.values()) / len(facts.dense), color="black", linestyle=":", linewidth=1.2, label="dense model")
    if panel.free is not None:
        axis.axvspan(*panel.free, color="#F0E442", alpha=0.35, linewidth=0, label="the last layer: free")
    for number, series in enumerate(panel.series):
        color, line, marker = _STYLES[number % len(_STYLES)]
        x = [point.x for point in series.points]
        axis.fill_between(
            x,
            [point.low for point in series.points],
            [point.high for point in series.points],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
        axis.plot(
            x,
            [point.mean for point in series.points],
            color=color,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            linewidth=1.6,
            label=series.name,
        )
    axis.set_title(panel.title)
    axis.set_xlabel(study.x_label)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    _scale(axis, study, sorted({point.x for series in panel.series for point in series.points}))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: Axes, study: Study, values: list[float]) -> None:
    if study.x_scale == "percent":
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    elif study.x_scale == "log":
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif all(math.floor(value) == value for value in values):
        axis.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
