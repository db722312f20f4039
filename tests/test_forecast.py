"""The time left of a whole command."""

import pytest

from rlens_jax.forecast import RACED_SHARE, Forecast, Work


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 50.0
        monkeypatch.setattr("rlens_jax.forecast.time.monotonic", lambda: self.now)


def test_rates_are_learnt_and_apply_to_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    forecast = Forecast({"search": Work(full=[10, 10, 10], raced=[10, 8, 4]), "curves": Work(full=[100])})
    assert forecast.seconds("search") is None
    forecast.begin()
    clock.now += 60  # with compilation
    forecast.advance("search", 1, resumed=False)
    assert forecast.seconds("search") == pytest.approx((6 * (20 + 22 * RACED_SHARE), 6 * (120 + 22 * RACED_SHARE)))
    clock.now += 20
    forecast.advance("search", 2, resumed=False)
    assert forecast.seconds("search") == pytest.approx((22 * RACED_SHARE, 100 + 22 * RACED_SHARE))
    clock.now += 3
    forecast.advance("search", 1, resumed=False)
    assert forecast.seconds("search") == pytest.approx((12 * 0.3, 100 + 12 * 0.3))
    clock.now += 8  # the first of a rate no longer counts
    forecast.advance("search", 1, resumed=False)
    assert forecast.seconds("search") == pytest.approx((4, 104))
    forecast.advance("search", 1, resumed=False)
    assert forecast.seconds("curves") == pytest.approx((100, 100))


def test_resumed_items_count_for_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes within the rounds has no full item to measure."""
    clock = Clock(monkeypatch)
    forecast = Forecast({"search": Work(full=[10, 10], raced=[10, 10]), "curves": Work(full=[100])})
    forecast.begin()
    clock.now += 1
    forecast.advance("search", 2, resumed=True)
    assert forecast.seconds("search") is None
    clock.now += 4.2
    forecast.advance("search", 1, resumed=False)
    assert forecast.seconds("search") == pytest.approx((4.2, 4.2 + 42 / RACED_SHARE))
