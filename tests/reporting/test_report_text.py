import dataclasses
import html
import re
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from rlens_jax.config import SearchConfig
from rlens_jax.reporting.report_text import TITLES, found, report_markdown, summary
from rlens_jax.search.bootstrap import Interval
from tests.reporting.runs import HOSTILE, hostile_results
from tests.reporting.synthetic import synthetic_results, with_bounds, with_margin


@pytest.fixture(scope="module")
def results():
    return synthetic_results(with_search_all=True)


def with_area(results, operator, strategy, value):
    old = results.operators[operator]
    interval = Interval(*(np.array(bound) for bound in (value, value - 0.05, value + 0.05)))
    areas = {**old.areas, strategy: interval}
    return dataclasses.replace(results, operators={**results.operators, operator: dataclasses.replace(old, areas=areas)})


def test_the_report_has_rankings_savings_and_differences(results):
    text = report_markdown(results)
    for result in results.operators.values():
        assert ", ".join(map(str, result.ranking.order)) in text
        assert result.saving.plan.label() in text
    assert "Time is *measured*" in text
    assert "27.3 %" in text  # 1 - 0.08 / 0.11
    assert "x dense" in text
    for dataset in results.dense_test:
        assert f"| {dataset} | 60 | 60 |" in text


def test_it_says_whether_the_search_was_worth_it_and_why_not(results):
    won = with_margin(with_margin(results, "ffn", 0.01), "attention", 0.01)
    assert report_markdown(won).count("The searched order beats position and random") == 2
    assert "does not beat" not in report_markdown(won)
    lost = report_markdown(with_area(with_margin(won, "ffn", -0.01), "ffn", "search_all", 0.999))
    assert "**The searched order does not beat position and random**" in lost
    assert "on 180 validation samples" in lost
    assert "searching every layer (L_p = 0) gives a larger area" in lost


def test_a_one_shot_ranking_is_called_one_everywhere(results):
    one_shot = synthetic_results(samples=20, num_random=0, method="one_shot")
    text, lines = report_markdown(one_shot), summary(one_shot, Path("x")).splitlines()
    assert text.count("the others sorted by their scores in one round (one-shot, no greedy search)") == 2
    assert text.count(", one-shot\n") == 2  # the headings of both operators
    assert "times; all candidates are evaluated on all samples |" in text
    assert "times; candidates are dropped when they cannot win" in report_markdown(results)
    assert lines[0].endswith("best first, one-shot (no greedy search):")
    assert max(map(len, lines)) <= 100
    for result in one_shot.operators.values():
        assert found(result.ranking).splitlines()[0].startswith(f"{TITLES[result.ranking.operator]}, one-shot, best to reduce")
    assert "one-shot" not in report_markdown(results) + summary(results, Path("x"))


def test_divergences_are_in_nats_and_are_not_called_correct(results):
    search = SearchConfig(method="one_shot", one_shot_by="kl")
    config, metrics = dataclasses.replace(results.config, search=search), dict.fromkeys(results.dense_validation, -0.25)
    text = report_markdown(dataclasses.replace(results, config=config, dense_validation=metrics))
    assert "fidelity, not correctness: divergence of the answer's token distributions" in text
    assert "held-out curves: exact match, teacher forced. Fidelity counts the dense model's mistakes as right." in text
    assert "times; all candidates" not in text
    assert text.count("| 0.25 nats |") == len(metrics)
    assert text.count(" nats a sample |") == 2


def test_without_random_rankings_nobody_speaks_of_chance():
    results = with_margin(with_margin(synthetic_results(samples=20, num_random=0), "ffn", 0.01), "attention", -0.01)
    text = report_markdown(results)
    assert "## Does the search beat position?" in text
    assert text.count("The searched order beats position: the interval of the difference lies above 0.") == 1
    assert text.count("**The searched order does not beat position** beyond") == 1
    both = f"{text}\n{summary(results, Path('x'))}"
    assert "random" not in both and "chance" not in both
    assert ": beats position\n" in both and ": NOT better than position\n" in both


def test_candidates_that_stopped_early_are_counted_and_explained(results):
    assert "| 0 of 45 |" in report_markdown(results)
    assert "Stopped early" not in report_markdown(results)
    bounded = with_bounds(results)
    text = report_markdown(bounded)
    for result in bounded.operators.values():
        assert f"| {result.ranking.stopped_early} of 45 |" in text
        assert f"| at least {result.first_round_spread(bounded.validation_samples):.0f} samples |" in text
    assert "Its score is an upper bound" in text


def test_time_that_was_not_measured_is_not_reported(results):
    timing = dataclasses.replace(results.timing, prefill={})
    text = report_markdown(dataclasses.replace(results, timing=timing))
    assert "not measured" in text
    assert "Time is *measured*" not in text


def test_nothing_of_the_data_becomes_markup():
    def tags(text):
        return re.findall(r"<(/?[a-z]+\d?)", text)

    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    hostile, plain = (markdown.render(report_markdown(results)) for results in (hostile_results(), synthetic_results(samples=20)))
    assert tags(hostile) == tags(plain)
    assert html.unescape(hostile).count(" ".join(HOSTILE.split())) == 7


def test_two_harmless_reductions_with_a_loss_together_are_reported(results):
    combined = dataclasses.replace(results.combined, loss=0.052)
    assert "both at once lose 5.2 %" in report_markdown(dataclasses.replace(results, combined=combined))


@pytest.mark.parametrize("num_layers", [12, 80])
def test_the_summary_fits_a_terminal(num_layers):
    results = with_margin(synthetic_results(num_layers, 30, with_search_all=num_layers == 12), "ffn", -1.0)
    lines = summary(results, Path("runs/rank")).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100
    assert lines[-1] == f"Report: {Path('runs/rank/report.html')} (as text: report.md)"
    text = " ".join(" ".join(lines).split())
    assert " ".join(map(str, results.operators["ffn"].ranking.order[:10])) in text
    assert "NOT better than" in text
    assert "both at once" in text


def test_the_summary_of_one_operator_has_no_line_for_both():
    assert "both" not in summary(synthetic_results(operators=("ffn",)), Path("x"))
