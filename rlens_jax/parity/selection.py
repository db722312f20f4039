"""Judge which FFN units the probes of two implementations keep: the same, except for near-ties with the last one kept."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Comparison of the kept units of a layer, over samples with visual tokens."""

    mean: float
    """Share of the reference's kept units that our probes choose too."""
    smallest: float
    largest_gap: float
    """Largest distance of an exchanged unit's score from the U-th score, relative to that; 0 without exchanged units."""


def compare_selections(scores: np.ndarray, theirs: np.ndarray) -> Selection:
    """Compare our scores [samples, F] with the reference's kept units [samples, U].

    Our units are those with the U highest scores, ties to the lower unit (docs/method.md).
    """
    shares, gap = [] if len(scores) else [1.0], 0.0
    for row, units in zip(scores, theirs, strict=True):
        ours = np.argsort(-row, kind="stable")[: len(units)]
        shares.append(len(np.intersect1d(ours, units)) / len(units))
        exchanged = np.setxor1d(ours, units)
        last = row[ours[-1]]
        if len(exchanged):
            distance = float(np.abs(row[exchanged] - last).max())
            gap = max(gap, distance / float(last) if last > 0 else float("inf") if distance else 0.0)
    return Selection(float(np.mean(shares)), min(shares), gap)
