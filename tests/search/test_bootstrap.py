import numpy as np
import pytest

from rlens_jax.search.bootstrap import area_under_curve, bootstrap_interval, mean_over_datasets


def right_or_wrong(shape, share, seed=0):
    return (np.random.default_rng(seed).random(shape) < share).astype(float)


def test_the_value_is_the_statistic_of_the_data():
    outcomes = {"chart": np.array([[1, 1, 1, 1], [1, 0, 1, 0]]), "doc": np.array([[1, 0], [0, 0]])}
    curve = bootstrap_interval(outcomes, mean_over_datasets)
    assert curve.value.tolist() == [0.75, 0.25]
    assert bootstrap_interval(outcomes, area_under_curve([0, 4])).value == 0.5
    assert curve.low.shape == curve.high.shape == (2,)
    assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()


def test_the_interval_is_that_of_the_mean():
    # For many samples the interval is the normal one: p +- 1.96 sqrt(p (1 - p) / n).
    outcomes = right_or_wrong((1, 2000), 0.7)
    p = outcomes.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 2000)
    interval = bootstrap_interval({"chart": outcomes}, mean_over_datasets, samples=20_000)
    assert interval.low[0] == pytest.approx(p - half, abs=0.05 * half)
    assert interval.high[0] == pytest.approx(p + half, abs=0.05 * half)


def test_a_lower_level_is_narrower():
    outcomes = {"chart": right_or_wrong((1, 300), 0.5)}
    wide = bootstrap_interval(outcomes, mean_over_datasets, level=0.95)
    narrow = bootstrap_interval(outcomes, mean_over_datasets, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resampling_stays_within_a_dataset():
    # Each dataset is constant, so no resampling within it can change anything; pooling would.
    outcomes = {"easy": np.ones((1, 7)), "hard": np.zeros((1, 50))}
    interval = bootstrap_interval(outcomes, mean_over_datasets)
    assert interval.low == interval.value == interval.high == 0.5


def test_all_points_see_the_same_samples():
    # The second point gets exactly the first one's answers, the third exactly the others.
    first = right_or_wrong(200, 0.5)
    outcomes = {"chart": np.stack([first, first, 1 - first])}

    def differences(metrics):
        mean = mean_over_datasets(metrics)
        return np.stack([mean[:, 0] - mean[:, 1], mean[:, 0] + mean[:, 2]], axis=-1)

    interval = bootstrap_interval(outcomes, differences)
    np.testing.assert_allclose([interval.low, interval.high], [[0, 1], [0, 1]], atol=1e-12)


def test_seeded():
    outcomes = {"chart": right_or_wrong((2, 40), 0.6), "doc": right_or_wrong((2, 30), 0.3, seed=1)}
    once, again, other = (bootstrap_interval(outcomes, mean_over_datasets, samples=50, seed=seed) for seed in (1, 1, 2))
    assert once.low.tolist() == again.low.tolist()
    assert once.high.tolist() == again.high.tolist()
    assert once.low.tolist() != other.low.tolist()


def test_datasets_are_drawn_independently():
    # Opposite answers to the same number of questions: drawn with the same indices, they would cancel.
    first = right_or_wrong((1, 100), 0.5)
    interval = bootstrap_interval({"chart": first, "doc": 1 - first}, mean_over_datasets)
    assert interval.high - interval.low > 0.05


def test_an_image_is_drawn_with_all_its_questions():
    """Four questions with the same answer about each image are as good as one, and no better."""
    once = right_or_wrong((2, 60), 0.6)
    images = np.random.default_rng(1).permutation(np.repeat(np.arange(60), 4))
    ours = bootstrap_interval({"chart": once[:, images]}, mean_over_datasets, images={"chart": images})
    alone = bootstrap_interval({"chart": once[:, images]}, mean_over_datasets)
    expected = bootstrap_interval({"chart": once}, mean_over_datasets)
    widths = [interval.high - interval.low for interval in (ours, alone, expected)]
    np.testing.assert_allclose(widths[0], widths[2], rtol=0.15)
    assert (widths[1] < 0.65 * widths[0]).all()
    np.testing.assert_allclose(ours.value, expected.value)


def test_samples_with_images_of_their_own_are_drawn_as_before():
    outcomes = {"chart": right_or_wrong((2, 40), 0.6), "doc": right_or_wrong((2, 30), 0.3, seed=1)}
    numbers = {"chart": np.arange(100, 140), "doc": np.arange(30)}
    ours, plain = (bootstrap_interval(outcomes, mean_over_datasets, images=images) for images in (numbers, None))
    np.testing.assert_array_equal([ours.low, ours.high], [plain.low, plain.high])


def test_images_of_two_datasets_are_drawn_together():
    """Opposite answers about the same images cancel; images of one dataset keep their share of every draw."""
    first = right_or_wrong((1, 100), 0.5)
    pages = np.arange(100)
    shared = {"chart": pages, "doc": pages[::-1]}
    interval = bootstrap_interval({"chart": first, "doc": 1 - first[:, ::-1]}, mean_over_datasets, images=shared)
    assert interval.low == interval.high == 0.5
    # 100 images with one right question each, and 50 with a wrong one in the second dataset only.
    outcomes = {"chart": np.ones((1, 100)), "doc": np.concatenate([np.ones((1, 100)), np.zeros((1, 50))], axis=1)}
    interval = bootstrap_interval(outcomes, mean_over_datasets, images={"chart": pages, "doc": np.arange(150)})
    assert [float(interval.low[0]), float(interval.high[0])] == pytest.approx([(1 + 2 / 3) / 2] * 2)


def test_a_draw_of_images_with_more_questions_has_more_questions():
    """A metric stays a mean over questions: of two images, one with three right and one with one wrong question."""
    outcomes = {"chart": np.array([[1.0, 1.0, 1.0, 0.0]])}
    interval = bootstrap_interval(outcomes, lambda m: m[:, 0, 0], images={"chart": np.array([7, 7, 7, 2])})
    assert (interval.value, interval.low, interval.high) == (0.75, 0, 1)


def test_area_under_the_curve_by_hand():
    metrics = np.array([[[1.0, 0.8], [0.8, 0.6], [0.0, 0.0]]])  # means 0.9, 0.7, 0.0
    expected = ((0.9 + 0.7) / 2 * 1 + (0.7 + 0.0) / 2 * 3) / 4
    assert area_under_curve([0, 1, 4])(metrics) == pytest.approx([expected])
    assert area_under_curve([0, 1, 4])(np.ones((1, 3, 2))).tolist() == [1.0]


@pytest.mark.parametrize("num_reduced", [[], [3], [0, 2, 2], [4, 0]])
def test_a_curve_needs_ascending_points(num_reduced):
    with pytest.raises(ValueError, match="ascending"):
        area_under_curve(num_reduced)
