import os
import subprocess
import sys

from rlens_jax.commands.options import read_config
from rlens_jax.files import json_text
from rlens_jax.reporting.report_files import timing_fields, write_report
from rlens_jax.search.ranking_file import ranking_fields
from tests.reporting.synthetic import synthetic_results


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


def test_the_report_needs_no_jax():
    code = "import sys, rlens_jax.reporting.report_files; print('jax' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "False False\n", run.stderr


def test_timing_holds_what_ranking_json_does_not():
    timing = timing_fields(synthetic_results().timing)
    assert timing["seconds"]["search"] == 100
    assert timing["prefill"]["ffn"]["dense"] == (0.1, 0.12, 0.11)
