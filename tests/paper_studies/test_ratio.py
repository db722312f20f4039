"""The ratio of two losses stays in order where one of them is none."""

import numpy as np
import pytest

from rlens_jax.paper_studies.layer_studies import ratio_angle, ratio_of


def ratio(visual: float, text: float) -> float | str:
    (angle,) = ratio_angle(np.array([visual]), np.array([text]))
    return ratio_of(float(angle))


@pytest.mark.parametrize(
    ("visual", "text", "expected"), [(0.1, 0.25, 2.5), (0.1, 0.0, 0.0), (0.1, -0.05, -0.5), (1e-9, 0.5, 5e8)]
)
def test_of_a_loss_it_is_the_quotient(visual: float, text: float, expected: float) -> None:
    assert ratio(visual, text) == pytest.approx(expected)


@pytest.mark.parametrize("visual", [0.0, -0.0, -0.1])
def test_where_visual_loses_nothing_there_is_none(visual: float) -> None:
    assert ratio(visual, 0.3) == "infinite"
    for text in (0.0, -0.0, -0.3):
        assert ratio(visual, text) == "undefined"


def test_its_order_favours_no_claim() -> None:
    """From draws in which nothing is lost, over those in which only visual is, to those in which only text is."""
    rising = [(-0.1, -0.2), (0.1, -0.2), (0.1, 0.0), (0.1, 0.1), (0.1, 0.9), (0.01, 0.9), (0.0, 0.9), (-0.2, 0.9)]
    visual, text = np.array(rising).T
    angles = ratio_angle(visual, text)
    assert (np.diff(angles) > 0).all()
