"""The files of a finished ranking run."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from rlens_jax.files import json_text, replace_file
from rlens_jax.reporting.plots import plot_candidates, plot_curves
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.report_text import report_markdown
from rlens_jax.reporting.run_files import TIMING, RunFiles, read_examples
from rlens_jax.search.ranking_file import RANKING, ranking_fields
from rlens_jax.search.results import Results, Timing

TIMING_SCHEMA = "rlens-timing/1"


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ranking.json, timing.json, config.yaml, the plots, report.md and report.html; returns their paths.

    Everything is made before anything is written, and ranking.json is written last: a folder with it has a finished
    run. report.html also shows the folder's examples.json, if any.

    Raises:
        UserError: a file cannot be written, or the folder has the examples of another run.
    """
    ranking, timing = ranking_fields(results), timing_fields(results.timing)
    run = RunFiles(folder.resolve().name, ranking, timing, read_examples(folder, ranking))
    contents = {"curves.png": plot_curves(results, "png"), "curves.svg": plot_curves(results, "svg")}
    if any(result.ranking.rounds for result in results.operators.values()):
        contents["candidates.png"] = plot_candidates(results, "png")
        contents["candidates.svg"] = plot_candidates(results, "svg")
    contents["config.yaml"] = yaml.safe_dump(results.config.portable(), sort_keys=False).encode()
    contents["report.md"] = report_markdown(results).encode()
    contents["report.html"] = report_html([run]).encode()
    contents[TIMING] = json_text(timing).encode()
    contents[RANKING] = json_text(ranking).encode()
    return [replace_file(folder / name, content) for name, content in contents.items()]


def timing_fields(timing: Timing) -> dict[str, Any]:
    """The fields of timing.json: everything that differs between two runs of one configuration."""
    return {"schema": TIMING_SCHEMA, **dataclasses.asdict(timing)}
