import dataclasses
import os
import subprocess
import sys

import pytest

from rlens_jax.commands.options import read_config
from rlens_jax.errors import UserError
from rlens_jax.files import json_text
from rlens_jax.reporting.report_files import is_finished, timing_fields, write_provisional, write_rankings, write_report
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.report_text import summary
from rlens_jax.reporting.run_files import read_run
from rlens_jax.search.ranking_file import ranking_fields
from tests.reporting.synthetic import only_searched, synthetic_results


def test_all_files_are_written_and_ranking_json_last(tmp_path):
    results = synthetic_results(samples=20)
    paths = write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.name for path in paths} == {
        *("curves.png", "curves.svg", "candidates.png", "candidates.svg"),
        *("config.yaml", "report.md", "report.html", "timing.json", "ranking.json"),
    }
    assert paths[-1].read_text() == json_text(ranking_fields(results))
    again = read_config([("config", str(tmp_path / "config.yaml")), ("output", results.config.output)])
    assert again == results.config


def test_what_is_found_is_written_before_the_curves(tmp_path):
    """A provisional report says so; its files are read as those of a finished run, and are replaced by them."""
    results = synthetic_results(samples=20)
    write_provisional(only_searched(results, provisional=True, operators=("attention",)), tmp_path)
    assert not is_finished(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<strong>Provisional.</strong>" in page
    assert "Hollow Attention" in page
    assert "Dynamic FFN" not in page
    assert "held-out samples</p>" not in page
    alone = read_run(tmp_path)
    assert report_html([alone]) == page
    with pytest.raises(UserError, match="has no held-out curves to compare"):
        report_html([alone, alone])
    write_report(results, tmp_path)
    assert is_finished(tmp_path)
    assert "Provisional" not in (tmp_path / "report.html").read_text()


def test_a_run_can_end_with_its_rankings(tmp_path):
    found = only_searched(synthetic_results(samples=20), provisional=False)
    config = dataclasses.replace(found.config, report=dataclasses.replace(found.config.report, extent="none"))
    write_provisional(dataclasses.replace(found, config=config, provisional=True), tmp_path)
    assert not (tmp_path / "report.html").exists()
    names = [path.name for path in write_rankings(found, tmp_path)]
    assert names == ["config.yaml", "timing.json", "ranking.json"]
    assert is_finished(tmp_path)
    assert summary(found, tmp_path).endswith(f"Ranking: {tmp_path / 'ranking.json'}")
    assert "Provisional" not in report_html([read_run(tmp_path)])


def test_the_report_needs_no_jax():
    code = "import sys, rlens_jax.reporting.report_files; print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "False False\n", run.stderr


def test_timing_holds_what_ranking_json_does_not():
    timing = timing_fields(synthetic_results().timing)
    assert timing["seconds"]["search"] == 100
    assert timing["prefill"]["ffn"]["dense"] == (0.1, 0.12, 0.11)
