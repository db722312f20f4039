"""The Pareto plots of a comparison of methods, as PNG or SVG bytes; the same results give the same bytes."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlens_jax.reporting.front_plot import Mark, draw_pareto
from rlens_jax.reporting.plots import Format, drawn

AXES = {
    "prefill": "measured prefill time, % of dense",
    "first_token": "measured time to the first token, % of dense",
    "multiply_adds": "multiply-adds of prefill, probes and selection, % of dense",
    "kv_bytes": "KV cache, % of dense",
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
"""By Okabe and Ito."""
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "p", "h")
"""As many as have no factor in common with the colours, so that the first 77 pairs differ."""


def plot_comparison(fields: Mapping[str, Any], kind: Format) -> bytes:
    """Score against each cost, a panel each, from the fields of comparison.json."""
    return drawn(lambda: _figure(fields), kind)


def _figure(fields: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    styles = dict(zip(_families(fields), zip(cycle(_COLOURS), cycle(_MARKERS), strict=False), strict=False))
    for axis, cost in zip(panels.flat, AXES, strict=True):
        _panel(axis, fields, cost, styles)
    for axis in panels[:, 0]:
        axis.set_ylabel("score, % of dense, mean over the datasets")
    figure.suptitle("bars: 95 % bootstrap interval; faint: another method costs less and is surely as good", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _families(fields: Mapping[str, Any]) -> list[str]:
    """The names of the methods without their budgets, each once; the dense model is not among them."""
    return list(dict.fromkeys(_family(row) for row in fields["methods"][1:]))


def _family(row: Mapping[str, Any]) -> str:
    return str(row["name"]).partition("@")[0]


def _panel(axis: Axes, fields: Mapping[str, Any], cost: str, styles: Mapping[str, tuple[str, str]]) -> None:
    marks, seen = [], set()
    for place, row in enumerate(fields["methods"]):
        family = _family(row)
        colour, marker = styles[family] if place else ("black", "*")
        marks.append(
            Mark(
                across=row["costs"][cost],
                score=row["score"],
                colour=colour,
                marker=marker,
                size=8 if place else 13,
                label=None if family in seen else family,
                on_front=not row["dominated_by"][cost],
            )
        )
        seen.add(family)
    draw_pareto(axis, marks, [mark for mark in marks if mark.on_front])
    axis.set_xlabel(AXES[cost])
