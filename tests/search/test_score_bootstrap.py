"""The bootstrap of a dataset's score: whole groups, each stratum by itself, and the dataset's own formula."""

from dataclasses import replace

import numpy as np
import pytest

from rlens_jax.metrics.score import Row
from rlens_jax.metrics.scorers import score
from rlens_jax.search.bootstrap import difference_interval, score_draws, score_interval
from tests.metrics.benchmarks import hallusion_rows, mme_rows


def doc_rows(hits) -> list[Row]:
    return [Row(str(n), "cat" if hit else "owl", ("cat",)) for n, hit in enumerate(hits)]


def drawn(shape, share, seed=0):
    return (np.random.default_rng(seed).random(shape) < share).astype(int).tolist()


def test_the_interval_is_that_of_the_mean():
    # For many samples the interval is the normal one: p +- 1.96 sqrt(p (1 - p) / n).
    result = score("DocVQA_VAL", doc_rows(drawn(1000, 0.7)))
    p = result.value / 100
    half = 196 * np.sqrt(p * (1 - p) / 1000)
    interval = score_interval(result, samples=10_000)
    assert interval.low == pytest.approx(result.value - half, abs=0.05 * half)
    assert interval.high == pytest.approx(result.value + half, abs=0.05 * half)


def test_ocrbench_is_drawn_on_its_own_scale():
    rows = [replace(row, category="Doc-oriented VQA") for row in doc_rows(drawn(200, 0.5))]
    interval, percent = (score_interval(score(dataset, rows), samples=200) for dataset in ("OCRBench", "DocVQA_VAL"))
    assert (interval.low, interval.high) == pytest.approx((10 * percent.low, 10 * percent.high))


def test_a_lower_level_is_narrower():
    result = score("DocVQA_VAL", doc_rows(drawn(300, 0.5)))
    wide, narrow = (score_interval(result, level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < result.value < narrow.high < wide.high


def test_seeded():
    result = score("MME", mme_rows({}, drawn((20, 2), 0.5)))
    once, again, other = (score_draws(result, samples=50, seed=seed) for seed in (1, 1, 2))
    assert once.tolist() == again.tolist() != other.tolist()
    assert once.shape == (50,)
    assert once.dtype == np.float64


def test_two_models_are_drawn_on_the_same_questions():
    hits = np.array(drawn(100, 0.5))
    right, wrong = (score_draws(score("DocVQA_VAL", doc_rows(outcomes)), samples=50) for outcomes in (hits, 1 - hits))
    assert right.std() > 1
    np.testing.assert_allclose(right + wrong, 100)


def test_a_difference_is_of_the_same_questions():
    # Both models answer all questions alike except one, so every draw differs by that question.
    hits = np.array(drawn(100, 0.5))
    better, worse = hits.copy(), hits.copy()
    better[0], worse[0] = 1, 0
    scores = [score("DocVQA_VAL", doc_rows(outcomes)) for outcomes in (better, worse)]
    change = difference_interval(*scores)
    assert change.value == pytest.approx(1)
    assert change.low == 0
    assert change.high == pytest.approx(3)


def test_mme_draws_images_within_their_category():
    # Every category is all right or all wrong, so drawing within categories cannot change anything.
    rows = mme_rows({"OCR": [(0, 0)] * 3, "scene": [(0, 0)]}, [(1, 1)] * 5)
    assert score_draws(score("MME", rows), samples=100) == pytest.approx(2400)


def test_mme_draws_both_questions_of_an_image():
    # One right answer per image: drawn by image, every draw has half of the answers and no image.
    rows = mme_rows({}, [(1, 0), (0, 1)] * 4)
    assert score_draws(score("MME", rows), samples=100) == pytest.approx(700)


def copies(rows: list[Row], groups: tuple[str, ...], times: dict[str, int]) -> list[tuple[Row, int]]:
    return [(row, n) for row, group in zip(rows, groups, strict=True) for n in range(times[group])]


def test_questions_about_one_image_are_drawn_together():
    hits = drawn(60, 0.5)
    twice = score("DocVQA_VAL", doc_rows(np.repeat(hits, 2)))
    once = score_draws(score("DocVQA_VAL", doc_rows(hits)), samples=50)
    assert score_draws(twice, np.repeat(range(60), 2).tolist(), samples=50) == pytest.approx(once)
    # Images of their own change nothing.
    assert score_draws(twice, range(120), samples=50) == pytest.approx(score_draws(twice, samples=50))


def test_an_image_in_several_strata_is_drawn_once_for_all():
    hits = np.repeat(drawn((30, 1), 0.5), 2, axis=1)
    rows = mme_rows({"OCR": hits.tolist(), "count": (1 - hits).tolist()}, [(1, 1)] * 30)
    draws = score_draws(score("MME", rows), [row.image for row in rows], samples=50)
    # One of the two categories is right wherever the other is wrong.
    assert draws == pytest.approx(2800 - 200)
    assert score_draws(score("MME", rows), samples=50).std() > 1


def counts(groups: tuple[str, ...], strata: tuple[str, ...], samples: int, seed: int) -> list[dict[str, int]]:
    """How often each group is drawn in each draw."""
    rng = np.random.default_rng(seed)
    draws: list[dict[str, int]] = [{} for _ in range(samples)]
    for stratum in dict.fromkeys(strata):
        names = list(dict.fromkeys(g for g, s in zip(groups, strata, strict=True) if s == stratum))
        for times, row in zip(draws, rng.multinomial(len(names), [1 / len(names)] * len(names), samples), strict=True):
            times |= dict(zip(names, row.tolist(), strict=True))
    return draws


def test_a_draw_of_mme_scores_what_its_rows_score():
    rows = mme_rows({"OCR": drawn((7, 2), 0.4)}, drawn((4, 2), 0.6, seed=1))
    result = score("MME", rows)
    for value, times in zip(score_draws(result, samples=20, seed=3), counts(result.groups, result.strata, 20, 3), strict=True):
        sample = [
            replace(row, index=f"{row.index}x{n}", image=f"{row.image}x{n}") for row, n in copies(rows, result.groups, times)
        ]
        assert value == pytest.approx(score("MME", sample).value)


def test_a_draw_of_hallusion_bench_scores_what_its_rows_score():
    hits = iter(drawn(200, 0.7))
    rows = [
        row
        for l2_category in ("map", "math")
        for row in hallusion_rows(
            {(str(s), str(f), str(q)): next(hits) for s in range(6) for f in range(1 + s % 3) for q in range(3)},
            l2_category=l2_category,
        )
    ]
    result = score("HallusionBench", rows)
    for value, times in zip(score_draws(result, samples=20, seed=3), counts(result.groups, result.strata, 20, 3), strict=True):
        sample = []
        for row, n in copies(rows, result.groups, times):
            parts = row.index.split("_")
            parts[3] += f"x{n}"
            sample.append(replace(row, index="_".join(parts)))
        assert value == pytest.approx(score("HallusionBench", sample).value)
