import os
import subprocess
import sys

import pytest

from rlens_jax.config import load_config
from rlens_jax.errors import UserError
from rlens_jax.reporting.files import replace_file, write_report
from rlens_jax.reporting.ranking_json import ranking_json
from tests.reporting.synthetic import synthetic_results


def test_all_files_are_written_and_ranking_json_last(tmp_path):
    results = synthetic_results(samples=20)
    paths = write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.name for path in paths} == {
        *("curves.png", "curves.svg", "candidates.png", "candidates.svg"),
        *("config.yaml", "report.md", "report.html", "timing.json", "ranking.json"),
    }
    assert paths[-1].read_text() == ranking_json(results)
    again = load_config(["--config", str(tmp_path / "config.yaml"), "--output", results.config.output])
    assert again == results.config


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = replace_file(tmp_path / "a.txt", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
        replace_file(tmp_path / "missing" / "a.txt", b"new")


def test_the_report_needs_no_jax():
    code = "import sys, rlens_jax.reporting.files; print('jax' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "False False\n", run.stderr
