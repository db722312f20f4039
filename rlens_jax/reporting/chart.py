"""Layout of the report's curve charts and heat maps: geometry and colours for the template, and the texts on hover.

A chart is small enough for a phone; wide screens put charts side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor, log10, sqrt
from typing import Any

from rlens_jax.reporting.measure_text import loss_text, metric_text

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 428, 28, 262
"""Edges of the plotting area, in SVG units, y downwards."""
_LETTER, _LINE = 7.6, 15
"""Width of a letter and height of a line of a label, generous so that labels stay apart."""
MINUS = "\u2212"
SHADES = 8
"""Shades of harm; shade 0 is none."""
_Scale = Callable[[float], float]
"""Maps a value to SVG units."""


@dataclass(frozen=True)
class Series:
    """One curve; with `joined` False, separate points with whiskers.

    Attributes:
        name: name in hover texts and tables.
        label: text next to the curve.
        style: CSS class of its colour.
        x, y: coordinates of the points.
        low, high: bounds of the band or the whiskers.
        notes: further text per point; may be empty.
    """

    name: str
    label: str
    style: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    notes: tuple[str, ...]
    joined: bool = True


@dataclass(frozen=True)
class Mark:
    """A point of a curve with a ring around it."""

    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Reading:
    """One series at a step: its value and interval as text, and the height `top` of its point in SVG units."""

    name: str
    style: str
    value: str
    interval: str
    note: str
    top: float


@dataclass(frozen=True)
class Step:
    """The readings of all series at one place of the horizontal axis; `left` in SVG units."""

    title: str
    left: float
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A series in SVG units: `line` and `band` are path data, `points` (x, y, low, high)."""

    style: str
    joined: bool
    line: str
    band: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Label:
    """A text next to a curve; x and y are its centre."""

    text: str
    style: str
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """A chart as the template draws it."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    reference: float
    series: tuple[Drawn, ...]
    labels: tuple[Label, ...]
    marks: tuple[Mark, ...]
    steps: tuple[Step, ...]


def curve_chart(
    title: str,
    series: Sequence[Series],
    marks: Sequence[Mark],
    *,
    x_end: float,
    x_title: str,
    y_title: str,
    step_title: str,
    reference: float,
) -> Chart:
    """Lay out curves of shares (shown in percent) over 0 to `x_end`.

    Args:
        title: description for screen readers.
        series: the curves from back to front.
        marks: points to ring.
        step_title: title of a step, with `{x}` for its place.
        reference: the share that all curves are compared with, drawn as a horizontal line.
    """
    lowest = min(reference, *(min(one.low) for one in series))
    highest = max(reference, *(max(one.high) for one in series))
    y_values = nice_ticks(lowest, highest, 5)
    bottom, top = y_values[0], y_values[-1]

    def across(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / x_end, 1)

    def up(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - bottom) / (top - bottom), 1)

    decimals = max(0, -floor(log10(100 * (y_values[1] - y_values[0])) + 1e-9))
    drawn = tuple(_drawn(one, across, up) for one in series)
    return Chart(
        title=title,
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple(Tick(across(x), f"{x:g}") for x in _whole_ticks(x_end)),
        y_ticks=tuple(Tick(up(y), f"{100 * y:.{decimals}f}") for y in y_values),
        reference=up(reference),
        series=drawn,
        labels=_place_labels(series, drawn, up(reference)),
        marks=tuple(Mark(across(mark.x), up(mark.y), mark.style) for mark in marks),
        steps=tuple(
            Step(
                title=step_title.format(x=f"{x:.3g}"),
                left=across(x),
                readings=tuple(_reading(one, x, up) for one in series if x in one.x),
            )
            for x in sorted({x for one in series for x in one.x})
        ),
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, evenly spaced, the first at or below `low` and the last at or above `high`."""
    spread = max(high - low, 1e-3)
    magnitude = 10 ** floor(log10(spread / count))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= 0.999 * spread / count)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _whole_ticks(end: float) -> list[float]:
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, 1000) if end / step <= 12)
    return [float(x) for x in range(0, int(end) + 1, step)]


def _drawn(series: Series, across: _Scale, up: _Scale) -> Drawn:
    points = tuple(
        (across(x), up(y), up(low), up(high)) for x, y, low, high in zip(series.x, series.y, series.low, series.high, strict=True)
    )
    line = "M" + "L".join(f"{x} {y}" for x, y, _, _ in points)
    there = [f"{x} {high}" for x, _, _, high in points]
    back = [f"{x} {low}" for x, _, low, _ in reversed(points)]
    return Drawn(series.style, series.joined, line, "M" + "L".join(there + back) + "Z", points)


def _reading(series: Series, x: float, up: _Scale) -> Reading:
    place = series.x.index(x)
    return Reading(
        name=series.name,
        style=series.style,
        value=f"{100 * series.y[place]:.1f} %",
        interval=f"{100 * series.low[place]:.1f} to {100 * series.high[place]:.1f}",
        note=series.notes[place],
        top=up(series.y[place]),
    )


def _place_labels(series: Sequence[Series], drawn: Sequence[Drawn], reference: float) -> tuple[Label, ...]:
    """A label for each curve, near its own curve and far from everything else.

    Tries the places above and below every point and takes the one with the least penalty, the front series first.
    """
    ink = {number: _samples(one) for number, one in enumerate(drawn)}
    ink[len(drawn)] = [(float(x), reference) for x in range(LEFT, RIGHT, 4)]
    labels: list[Label] = []
    for number in sorted(range(len(drawn)), reverse=True):
        one = series[number]
        half = _LETTER * len(one.label) / 2
        places = [
            Label(one.label, one.style, min(max(x, LEFT + half + 4), RIGHT - half), y)
            for x, _, low, high in drawn[number].points
            for y in (high - 0.75 * _LINE, low + 0.75 * _LINE)
        ]
        best = min(places, key=lambda place: _penalty(place, half, labels, ink, number))
        labels.append(replace(best, x=round(best.x, 1), y=round(best.y, 1)))
    return tuple(labels)


def _penalty(
    place: Label, half: float, labels: Sequence[Label], ink: Mapping[int, Sequence[tuple[float, float]]], number: int
) -> float:
    """How bad a place is for the label of series `number`, which is 2 * `half` wide."""
    x, y = place.x, place.y
    inside = TOP + 0.5 * _LINE < y < BOTTOM - 0.5 * _LINE
    penalty = 0.0 if inside else 1000.0
    for other in labels:
        apart = abs(other.x - x) > half + _LETTER * len(other.text) / 2 or abs(other.y - y) > _LINE
        penalty += 0 if apart else 300
    for owner, dots in ink.items():
        weight = 3 if owner == number else 10
        penalty += weight * sum(abs(a - x) < half and abs(b - y) < 0.6 * _LINE for a, b in dots)
        if owner != number:
            near = min(abs(b - y) + max(0, abs(a - x) - half) for a, b in dots)
            penalty -= min(near, 45) / 9
    return penalty


def _samples(drawn: Drawn) -> list[tuple[float, float]]:
    """Points along the line of a series, or along its whiskers."""
    if not drawn.joined:
        return [(x, low + (high - low) * part / 8) for x, _, low, high in drawn.points for part in range(9)]
    return [
        (x0 + (x1 - x0) * part / 6, y0 + (y1 - y0) * part / 6)
        for (x0, y0, _, _), (x1, y1, _, _) in pairwise(drawn.points)
        for part in range(6)
    ]


@dataclass(frozen=True)
class Cell:
    """A candidate of a heat map: shade of its harm, whether it won its round, whether its score is an upper bound, its score,
    and the text on hover.
    """

    shade: int
    chosen: bool
    bound: bool
    text: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """The candidates [rounds][layers], None for a layer that was ranked before, and the lowest score of each shade."""

    rows: tuple[tuple[Cell | None, ...], ...]
    legend: tuple[str, ...]

    @property
    def stopped_early(self) -> int:
        """The number of candidates whose evaluation stopped early."""
        return sum(cell is not None and cell.bound for row in self.rows for cell in row)


def heat_map(search: Mapping[str, Any], num_layers: int, worst: float, measure: str) -> HeatMap:
    """The heat map of an operator from its part of ranking.json's `search`; `worst` is the lowest score that the legend shows,
    `measure` what the search scores plans by.
    """
    rows = []
    for number, round_ in enumerate(search["rounds"], 1):
        cells: list[Cell | None] = [None] * num_layers
        for candidate in round_["candidates"]:
            cells[candidate["layer"]] = _cell(candidate, number, candidate["layer"] == round_["chosen"], worst, measure)
        rows.append(tuple(cells))
    return HeatMap(tuple(rows), shade_legend(worst))


def _cell(candidate: Mapping[str, Any], number: int, chosen: bool, worst: float, measure: str) -> Cell:
    metrics = ", ".join(f"{name} {metric_text(measure, value)}" for name, value in candidate["metrics"].items())
    score, loss = f"{candidate['score']:+.4f}", loss_text(measure, candidate["loss"])
    bound, at_most, at_least = (True, "at most ", "at least ") if candidate.get("bound") else (False, "", "")
    how = ", chosen" if chosen else ", stopped early" if bound else ""
    tip = f"round {number}, layer {candidate['layer']}{how}: score {at_most}{score}, loss {at_least}{loss}"
    return Cell(
        shade=shade(candidate["score"], worst),
        chosen=chosen,
        bound=bound,
        text=("\u2264 " if bound else "") + f"{candidate['score']:+.3f}".replace("-", MINUS),
        tip=tip.replace("-", MINUS) + f"; {at_most}{metrics}",
    )


def worst_score(searches: Mapping[str, Any]) -> float:
    """The lowest score of any candidate, or -0.001 if none is lower."""
    scores = [c["score"] for s in searches.values() for r in s["rounds"] for c in r["candidates"]]
    return min([*scores, -1e-3])


def shade(score: float, worst: float) -> int:
    """The shade of a score: 0 for no harm, up to `SHADES` for `worst`.

    It grows with the square root of the harm, because good candidates lie close together and bad ones far apart.
    """
    if score >= -1e-9:
        return 0
    return min(SHADES, max(1, ceil(SHADES * sqrt(score / worst) - 1e-9)))


def shade_legend(worst: float) -> tuple[str, ...]:
    """The lowest score of each shade."""
    bounds = (worst * (number / SHADES) ** 2 for number in range(1, SHADES + 1))
    return ("≥ 0", *(f"{bound:.2g}".replace("-", MINUS) for bound in bounds))
