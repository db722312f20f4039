import io
import re

import numpy as np
import pytest
from PIL import Image

from rlens_jax.reporting.plots import plot_candidates, plot_curves
from tests.reporting.synthetic import synthetic_results, with_bounds

PLOTS = (plot_curves, plot_candidates)


@pytest.fixture(scope="module")
def results():
    return synthetic_results(with_search_all=True)


@pytest.mark.parametrize("plot", PLOTS)
def test_the_same_results_give_the_same_bytes(plot, results):
    for kind in ("png", "svg"):
        assert plot(results, kind) == plot(results, kind)
    assert b"dc:date" not in plot(results, "svg")


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def test_the_curves_name_axes_units_and_all_strategies(results):
    found = texts(plot_curves(results, "svg"))
    for text in ("reduced layers", "held-out score, mean over the datasets (%)", "dense model", "searched"):
        assert text in found
    for text in ("by position, last layer first", "random rankings: mean and range"):
        assert text in found
    number = results.operators["ffn"].curves["searched"].allowed
    assert f"Dynamic FFN: {number} of 12 layers at &lt; 1 % loss" in found


def test_the_heat_map_names_axes_and_numbers_rounds_and_layers(results):
    found = texts(plot_candidates(results, "svg"))
    for text in ("layer", "round of the search", "candidate's score on validation (0 = dense model)"):
        assert text in found
    assert [found.count(str(number)) for number in (9, 10, 11)] == [4, 2, 2]


def test_a_one_shot_ranking_is_called_one(results):
    one_shot = synthetic_results(samples=20, num_random=0, method="one_shot")
    for plot in PLOTS:
        assert sum(", one-shot" in text for text in texts(plot(one_shot, "svg"))) == 2
        assert not any("one-shot" in text for text in texts(plot(results, "svg")))


def test_without_random_rankings_the_legend_has_none():
    found = texts(plot_curves(synthetic_results(samples=20, num_random=0), "svg"))
    assert "by position, last layer first" in found
    assert not any("random" in text for text in found)


def test_candidates_that_stopped_early_are_hatched(results):
    plain, hatched = (plot_candidates(each, "svg") for each in (results, with_bounds(results)))
    assert b"hatch" in hatched and b"hatch" not in plain
    assert any(text.startswith("hatched: stopped early") for text in texts(hatched))
    assert not any("hatched" in text for text in texts(plain))


@pytest.mark.parametrize("num_layers", [3, 80])
@pytest.mark.parametrize("plot", PLOTS)
def test_few_and_many_layers_and_one_operator_fit(plot, num_layers):
    image = Image.open(io.BytesIO(plot(synthetic_results(num_layers, 20, operators=("ffn",)), "png")))
    assert 500 < image.width < 3000
    assert 300 < image.height < 2500
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
