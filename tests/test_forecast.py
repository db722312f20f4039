"""The time left of a whole command."""

from dataclasses import replace

import pytest

from rlens_jax.config import ReportConfig, RunConfig, SearchConfig
from rlens_jax.forecast import RACED_SHARE, Forecast, Work
from rlens_jax.search.expected_work import expected_work
from rlens_jax.search.search import num_evaluations


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


def test_the_work_of_a_run_counts_the_layers_of_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """L = 4 and L_p = 1: the dense plan, one layer by position, and rounds of three, two and one candidates."""
    clock, samples = Clock(monkeypatch), {"validation": 10, "test": 5}
    search = SearchConfig(operators=("ffn",), position_layers=1)
    forecast = expected_work(RunConfig(search=search, report=ReportConfig(extent="none")), 4, samples)
    forecast.begin()
    clock.now += 40
    forecast.advance("ranking ffn", 1, resumed=False)
    rounds = (2 + 3 + 4) + (3 + 4) + 4
    assert forecast.seconds("ranking ffn") == pytest.approx((10 + 10 * RACED_SHARE * rounds,) * 2)
    forecast.advance("ranking ffn", num_evaluations(4, 1, "greedy"), resumed=True)  # the dense plan is also the base
    assert forecast.seconds("ranking ffn") == (0, 0)

    one_shot = expected_work(RunConfig(search=replace(search, method="one_shot"), report=ReportConfig(extent="none")), 4, samples)
    one_shot.begin()
    clock.now += 40
    one_shot.advance("ranking ffn", 1, resumed=False)
    assert one_shot.seconds("ranking ffn") == pytest.approx((10 + 10 * (2 + 3 + 4),) * 2)  # all in full
    one_shot.advance("ranking ffn", num_evaluations(4, 1, "one_shot"), resumed=True)
    assert one_shot.seconds("ranking ffn") == (0, 0)

    full = expected_work(RunConfig(search=replace(search, stopping="none")), 4, samples)
    full.begin()
    clock.now += 40
    full.advance("ranking ffn", 1, resumed=False)
    phase, whole = full.seconds("ranking ffn") or (0, 0)
    assert phase == 10 + 10 * rounds
    assert whole == phase + 5 * (4 + 2 * 3 * 2.5)
    full.end("held-out curves")
    assert full.seconds("ranking ffn") == (phase, phase)
