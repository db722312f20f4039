"""Differences of arrays: largest and relative ones of states and logits, and divergences of the distributions of logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

POSITIONS_PER_STEP = 64
"""Positions whose log-probabilities are in memory in float64 at the same time."""


@dataclass(frozen=True)
class LogitsDifference:
    """Differences over all compared positions; None if our logits are not all finite."""

    num_positions: int
    max_absolute: float | None
    max_relative: float | None
    argmax_agreement: float
    """Share of positions with the same argmax."""
    mean_kl: float | None
    """Mean over positions of the Kullback-Leibler divergence from the reference, in nats."""
    max_kl: float | None


def logits_difference(ours: np.ndarray, theirs: np.ndarray) -> LogitsDifference:
    """Compare logits [positions, V]."""
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    if not np.isfinite(ours).all():
        return LogitsDifference(len(theirs), None, None, agreement, None, None)
    divergences = np.concatenate(list(_divergences(theirs, ours)))
    return LogitsDifference(
        len(theirs),
        float(np.abs(ours - theirs).max()),
        relative([ours], [theirs]),
        agreement,
        float(divergences.mean()),
        float(divergences.max()),
    )


def relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Largest difference relative to max(1, max|theirs|); infinite if ours are not all finite."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    scale = max(1.0, *(float(np.abs(b).max()) for b in theirs))
    return largest / scale if np.isfinite(largest) else float("inf")


def relative_to_change(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], before: Sequence[np.ndarray], rounding: float
) -> float:
    """Largest difference of states [T_i, D], relative to what an operator added to the states `before`.

    Each token is relative to the largest number that the operator added to it, or to the median token if that is more, because
    the sums of an operator can cancel. Differences that rounding of the states explains (`rounding`, relative) do not count.
    A difference of a token to which nothing was added, because it skips the operator, is infinite.
    """
    a, b, x = (np.concatenate(list(rows)) for rows in (ours, theirs, before))
    peaks = np.abs(b - x).max(axis=1)
    scale = np.maximum(peaks, np.median(peaks))[:, None]
    if not scale.any():
        scale = np.ones_like(scale)
    excess = np.maximum(0, np.abs(a - b) - rounding * np.maximum(np.abs(b), np.abs(x)))
    with np.errstate(divide="ignore"):
        largest = float(np.divide(excess, scale, out=np.zeros_like(excess), where=excess != 0).max())
    return largest if np.isfinite(largest) else float("inf")


def _divergences(theirs: np.ndarray, ours: np.ndarray) -> Iterator[np.ndarray]:
    """Kullback-Leibler divergence of our logits from the reference at each position."""
    for start in range(0, len(theirs), POSITIONS_PER_STEP):
        p, q = (_log_softmax(x[start : start + POSITIONS_PER_STEP].astype(np.float64)) for x in (theirs, ours))
        yield np.maximum(0.0, (np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
