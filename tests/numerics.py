"""The project's one tolerance: |a - b| <= tol * max(1, max|b|)."""

import numpy as np


def error(actual, expected) -> float:
    """Largest difference, relative to the largest expected value where that is above 1."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


def assert_close(actual, expected, tolerance: float) -> None:
    difference = error(actual, expected)
    assert difference <= tolerance, f"differs by {difference:.2e}, allowed {tolerance:.0e}"
