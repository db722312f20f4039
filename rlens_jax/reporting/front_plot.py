"""The Pareto plot of a joint search, as PNG or SVG bytes; the same results give the same bytes."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlens_jax.reporting.front_report import front_rows
from rlens_jax.reporting.plots import Format, drawn

_STYLES = {
    "dense": ("black", "*"),
    "joint": ("#0072B2", "o"),
    "attention": ("#E69F00", "^"),
    "ffn": ("#009E73", "v"),
    "both": ("#CC79A7", "D"),
    "position": ("#D55E00", "s"),
    "random": ("#6E6E6E", "X"),
    "down-sampled": ("#56B4E9", "P"),
}
"""Colour and marker per kind of plan: Okabe and Ito's colours, which differ for any colour vision; the markers differ, too."""


def plot_front(fields: Mapping[str, Any], kind: Format) -> bytes:
    """Held-out score against measured prefill time; against FLOPs for plans whose time was not measured, as small marks."""
    return drawn(lambda: _front(fields), kind)


def _front(fields: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    rows, seen = front_rows(fields), set()
    for row, point in zip(rows, fields["points"], strict=True):
        colour, marker = _STYLES[point["kind"]]
        measured = row.time_saved is not None
        across = 1 - row.time_saved if row.time_saved is not None else row.cost or 1.0
        score = row.score
        spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        axis.errorbar(across, score["value"], spread, color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        axis.plot(
            across,
            score["value"],
            marker=marker,
            markersize=13 if row.published else 8 if measured else 4,
            color=colour,
            markeredgecolor="black" if row.published else colour,
            linestyle="none",
            alpha=1.0 if row.on_front else 0.45,
            zorder=3,
            label=None if row.kind in seen else row.kind,
        )
        seen.add(row.kind)
    ordered = sorted((1 - row.time_saved, row.score["value"]) for row in rows if row.on_front and row.time_saved is not None)
    axis.plot(*zip(*ordered, strict=True), color="black", linewidth=0.6, alpha=0.5, zorder=1)
    axis.set_xlabel("measured prefill time, % of dense (small marks: predicted cost)")
    axis.set_ylabel("held-out score, mean over the datasets (%)")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=""))
    axis.set_title(f"budget {fields['budget']}; bars: 95 % bootstrap interval; faint: dominated", fontsize=10)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
