"""Where everything of a curve chart goes: geometry for the template's SVG, and texts for those who point at it.

A chart is drawn small enough to be read on a phone as it is; wide screens put charts side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 428, 28, 262
"""Of the plotting area; SVG units, y downwards."""
_LETTER, _LINE = 7.6, 15
"""Size of a letter of a label; enough to keep labels off each other."""
_Scale = Callable[[float], float]
"""Maps a value to SVG units."""


@dataclass(frozen=True)
class Series:
    """One curve, or, with `joined` False, marks with whiskers.

    Attributes:
      name: in hover texts and tables.
      label: written beside the curve.
      style: the CSS class that colours it.
      x, y: of its points.
      low, high: of the band, or of the whiskers.
      notes: one more text for each point; may be empty.
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
    """A point of a curve that the text speaks of."""

    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Reading:
    """What one series says at a step: its value and interval as text, and where its point is (`top`, SVG units)."""

    name: str
    style: str
    value: str
    interval: str
    note: str
    top: float


@dataclass(frozen=True)
class Step:
    """All that is known at one place of the horizontal axis; `left` in SVG units."""

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
    """A text beside a curve; x and y are its middle."""

    text: str
    style: str
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """Everything the template needs."""

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
      title: what the chart shows, for those who cannot see it.
      series: from the back to the front.
      marks: points to be ringed.
      x_end: end of the horizontal axis.
      x_title, y_title: of the axes.
      step_title: of a step, with `{x}` for its place.
      reference: a share to which all are compared; drawn as a line across.
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
        (across(x), up(y), up(low), up(high))
        for x, y, low, high in zip(series.x, series.y, series.low, series.high, strict=True)
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
    """A label beside each curve, where it is nearest to its own and far from all that is drawn.

    Tries the places above and below every point and takes the one with the least trouble, the front series first.
    """
    ink = {number: _samples(one) for number, one in enumerate(drawn)}
    ink[len(drawn)] = [(float(x), reference) for x in range(LEFT, RIGHT, 4)]
    labels: list[Label] = []
    for number in sorted(range(len(drawn)), reverse=True):
        text, points = series[number].label, drawn[number].points
        half = _LETTER * len(text) / 2
        best: tuple[float, Label] | None = None
        for x, _, low, high in points:
            for y in (high - 0.75 * _LINE, low + 0.75 * _LINE):
                x = min(max(x, LEFT + half + 4), RIGHT - half)
                inside = TOP + 0.5 * _LINE < y < BOTTOM - 0.5 * _LINE
                trouble = 0.0 if inside else 1000.0
                for other in labels:
                    apart = abs(other.x - x) > half + _LETTER * len(other.text) / 2 or abs(other.y - y) > _LINE
                    trouble += 0 if apart else 300
                for owner, dots in ink.items():
                    weight = 3 if owner == number else 10
                    trouble += weight * sum(abs(a - x) < half and abs(b - y) < 0.6 * _LINE for a, b in dots)
                    if owner != number:
                        near = min(abs(b - y) + max(0, abs(a - x) - half) for a, b in dots)
                        trouble -= min(near, 45) / 9
                if best is None or trouble < best[0]:
                    best = (trouble, Label(text, series[number].style, round(x, 1), round(y, 1)))
        assert best is not None
        labels.append(best[1])
    return tuple(labels)


def _samples(drawn: Drawn) -> list[tuple[float, float]]:
    """Points along what a series draws: its line, or its whiskers."""
    if not drawn.joined:
        return [(x, low + (high - low) * part / 8) for x, _, low, high in drawn.points for part in range(9)]
    parts = [part / 6 for part in range(6)]
    return [
        (x0 + (x1 - x0) * part, y0 + (y1 - y0) * part)
        for (x0, y0, _, _), (x1, y1, _, _) in zip(drawn.points, drawn.points[1:], strict=False)
        for part in parts
    ]
