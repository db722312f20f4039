"""Per-layer tables: what every candidate of every round cost, and which layers each operator can lose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

MINUS = "\u2212"

SHADES = 8
"""Shades of harm; shade 0 is none."""


@dataclass(frozen=True)
class Cell:
    """A candidate: its `shade`, whether it was `chosen`, its score as `text`, and all about it as `tip`."""

    shade: int
    chosen: bool
    text: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """Rounds by layers; None where a layer was ranked already. `legend[i]` says what shade i stands for."""

    rows: tuple[tuple[Cell | None, ...], ...]
    legend: tuple[str, ...]


@dataclass(frozen=True)
class LayerCell:
    """A layer in the order of its place: its rank (from 1), and whether the plan reduces it."""

    layer: int
    rank: int
    lost: bool


def heat_map(search: Mapping[str, Any], num_layers: int, worst: float) -> HeatMap:
    """Every round's score of every layer.

    Args:
      search: an operator's part of ranking.json's `search`.
      num_layers: L.
      worst: the lowest score that is shown, over all heat maps beside each other.
    """
    rows = []
    for number, round_ in enumerate(search["rounds"], 1):
        cells: list[Cell | None] = [None] * num_layers
        for candidate in round_["candidates"]:
            chosen = candidate["layer"] == round_["chosen"]
            metrics = ", ".join(f"{name} {100 * value:.1f} %" for name, value in candidate["metrics"].items())
            score, loss = f"{candidate['score']:+.4f}", f"{100 * candidate['loss']:.2f} %"
            tip = (
                f"round {number}, layer {candidate['layer']}{', chosen' if chosen else ''}: score {score}, loss {loss}"
            )
            cells[candidate["layer"]] = Cell(
                shade=shade(candidate["score"], worst),
                chosen=chosen,
                text=f"{candidate['score']:+.3f}".replace("-", MINUS),
                tip=tip.replace("-", MINUS) + f"; {metrics}",
            )
        rows.append(tuple(cells))
    return HeatMap(tuple(rows), shade_legend(worst))


def worst_score(searches: Mapping[str, Any]) -> float:
    """The lowest score of any candidate, and below 0 in any case."""
    scores = [c["score"] for s in searches.values() for r in s["rounds"] for c in r["candidates"]]
    return min([*scores, -1e-3])


def shade(score: float, worst: float) -> int:
    """0 for no harm, to `SHADES` for `worst`. Good candidates lie close together and bad ones far apart, so it goes with
    the root of the harm.
    """
    if score >= -1e-9:
        return 0
    return min(SHADES, max(1, ceil(SHADES * sqrt(score / worst) - 1e-9)))


def shade_legend(worst: float) -> tuple[str, ...]:
    """The lowest score of each shade."""
    bounds = (worst * (number / SHADES) ** 2 for number in range(1, SHADES + 1))
    return ("≥ 0", *(f"{bound:.2g}".replace("-", MINUS) for bound in bounds))


def layer_row(order: Sequence[int], lost: Sequence[int]) -> tuple[LayerCell, ...]:
    """Layers by their place, from a ranking and the layers that a plan reduces."""
    ranks = {layer: rank for rank, layer in enumerate(order, 1)}
    return tuple(LayerCell(layer, ranks[layer], layer in lost) for layer in sorted(order))
