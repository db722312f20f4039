"""The Pareto plot of a joint search, as PNG or SVG bytes; the same results give the same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
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


@dataclass(frozen=True)
class Mark:
    """A point of a Pareto plot.

    Attributes:
        across, score: a share of the dense cost, and the score with its interval (`value`, `low`, `high`), a share, too.
        colour, marker, size: its look.
        label: in the legend, None if another mark of its look has one.
        on_front: joined by a line; the others are faint.
        outlined: whether it stands out.
    """

    across: float
    score: Mapping[str, float]
    colour: str
    marker: str
    size: float
    label: str | None
    on_front: bool
    outlined: bool = False


def draw_pareto(axis: Axes, marks: Sequence[Mark], joined: Sequence[Mark]) -> None:
    """Score against cost, with intervals, and a line along the `joined` marks."""
    for mark in marks:
        value = mark.score["value"]
        spread = [[max(0.0, value - mark.score["low"])], [max(0.0, mark.score["high"] - value)]]  # of few draws it may lie beside
        axis.errorbar(mark.across, value, spread, color=mark.colour, linewidth=0.8, alpha=0.6, zorder=2)
        axis.plot(
            mark.across,
            value,
            marker=mark.marker,
            markersize=mark.size,
            color=mark.colour,
            markeredgecolor="black" if mark.outlined else mark.colour,
            linestyle="none",
            alpha=1.0 if mark.on_front else 0.45,
            zorder=3,
            label=mark.label,
        )
    ordered = sorted((mark.across, mark.score["value"]) for mark in joined)
    axis.plot(*zip(*ordered, strict=True), color="black", linewidth=0.6, alpha=0.5, zorder=1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=""))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def plot_front(fields: Mapping[str, Any], kind: Format) -> bytes:
    """Held-out score against measured prefill time; against FLOPs for plans whose time was not measured, as small marks."""
    return drawn(lambda: _front(fields), kind)


def _front(fields: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    marks, timed, seen = [], [], set()
    for row, point in zip(front_rows(fields), fields["points"], strict=True):
        colour, marker = _STYLES[point["kind"]]
        measured = row.time_saved is not None
        mark = Mark(
            across=1 - row.time_saved if row.time_saved is not None else row.cost or 1.0,
            score=row.score,
            colour=colour,
            marker=marker,
            size=13 if row.published else 8 if measured else 4,
            label=None if row.kind in seen else row.kind,
            on_front=row.on_front,
            outlined=row.published,
        )
        marks.append(mark)
        timed += [mark] if measured and row.on_front else []
        seen.add(row.kind)
    draw_pareto(axis, marks, timed)
    axis.set_xlabel("measured prefill time, % of dense (small marks: predicted cost)")
    axis.set_ylabel("held-out score, mean over the datasets (%)")
    axis.set_title(f"budget {fields['budget']}; bars: 95 % bootstrap interval; faint: dominated", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
