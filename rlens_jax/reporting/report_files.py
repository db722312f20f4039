"""The files of a finished ranking run."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from rlens_jax.errors import UserError
from rlens_jax.files import json_text, replace_file
from rlens_jax.reporting.front_report import write_front
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.report_text import report_markdown
from rlens_jax.reporting.run_files import TIMING, RunFiles, read_examples, read_joint
from rlens_jax.reporting.seen_files import read_seen
from rlens_jax.search.ranking_file import RANKING, ranking_fields, read_ranking
from rlens_jax.search.results import Results, Searched, Timing

TIMING_SCHEMA = "rlens-timing/1"


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ranking.json, timing.json, config.yaml, the plots, report.md and report.html; returns their paths.

    The files of a joint search are written first, if there was one.

    Everything is made before anything is written, and ranking.json is written last: a folder with it has a finished
    run. report.html also shows the folder's examples.json and seen.json, if any.

    Raises:
        UserError: a file cannot be written, or the folder has the examples of another run.
    """
    # Imported late: a run needs matplotlib at its end only, and importing it takes a second.
    from rlens_jax.reporting.plots import plot_candidates, plot_curves

    if results.front is not None:
        write_front(results.front, folder, page=False)
    ranking, timing = ranking_fields(results), timing_fields(results.timing)
    name, examples, joint = folder.resolve().name, read_examples(folder, ranking), read_joint(folder, ranking)
    run = RunFiles(name, ranking, timing, examples, joint, read_seen(folder, ranking))
    contents = {"curves.png": plot_curves(results, "png"), "curves.svg": plot_curves(results, "svg")}
    if any(result.ranking.rounds for result in results.operators.values()):
        contents["candidates.png"] = plot_candidates(results, "png")
        contents["candidates.svg"] = plot_candidates(results, "svg")
    contents["report.md"] = report_markdown(results).encode()
    contents["report.html"] = report_html([run]).encode()
    return [*(replace_file(folder / name, content) for name, content in contents.items()), *write_rankings(results, folder)]


def write_rankings(run: Searched, folder: Path) -> list[Path]:
    """Write config.yaml, timing.json and, last, ranking.json; returns their paths. UserError if one cannot be written."""
    contents = {
        "config.yaml": yaml.safe_dump(run.config.portable(), sort_keys=False),
        TIMING: json_text(timing_fields(run.timing)),
        RANKING: json_text(ranking_fields(run)),
    }
    return [replace_file(folder / name, content.encode()) for name, content in contents.items()]


def write_provisional(run: Searched, folder: Path) -> None:
    """Write the rankings found so far, and a report.html that shows them, if the run ends with one.

    UserError if a file cannot be written.
    """
    files = RunFiles(folder.resolve().name, ranking_fields(run), timing_fields(run.timing), examples=None)
    page = report_html([files])
    write_rankings(run, folder)
    if run.config.report.extent == "full":
        replace_file(folder / "report.html", page.encode())


def is_finished(folder: Path) -> bool:
    """Whether the folder has the ranking.json of a finished run."""
    try:
        return not read_ranking(folder / RANKING).provisional
    except UserError:  # there is none, or one of another version
        return False


def timing_fields(timing: Timing) -> dict[str, Any]:
    """The fields of timing.json: everything that differs between two runs of one configuration."""
    return {"schema": TIMING_SCHEMA, **dataclasses.asdict(timing)}
