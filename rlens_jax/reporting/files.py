"""The files of a finished run, each complete or not there at all."""

from pathlib import Path

import yaml

from rlens_jax.config import portable
from rlens_jax.files import read_text, replace_file
from rlens_jax.reporting.html.page import report_html
from rlens_jax.reporting.html.run_files import EXAMPLES, RANKING, TIMING, parse_run
from rlens_jax.reporting.markdown import report_markdown
from rlens_jax.reporting.plots import plot_candidates, plot_curves
from rlens_jax.reporting.ranking_json import ranking_json, timing_json
from rlens_jax.search.results import Results


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ranking.json, timing.json, config.yaml, the plots, report.md and report.html; returns their paths.

    Everything is made before anything is written, and ranking.json comes last: where it is, the run is done. What
    report.html shows is read back from the JSON texts, and from the folder's examples.json where there is one.

    Raises:
      UserError: when the folder does not take a file, or has the examples of another run.
    """
    texts = {RANKING: ranking_json(results), TIMING: timing_json(results.timing)}
    examples = {EXAMPLES: read_text(folder / EXAMPLES)} if (folder / EXAMPLES).exists() else {}
    run = parse_run(folder.resolve().name, folder, texts | examples)
    contents = {"curves.png": plot_curves(results, "png"), "curves.svg": plot_curves(results, "svg")}
    if any(result.ranking.rounds for result in results.operators.values()):
        contents["candidates.png"] = plot_candidates(results, "png")
        contents["candidates.svg"] = plot_candidates(results, "svg")
    contents["config.yaml"] = yaml.safe_dump(portable(results.config), sort_keys=False).encode()
    contents["report.md"] = report_markdown(results).encode()
    contents["report.html"] = report_html([run]).encode()
    contents[TIMING] = texts[TIMING].encode()
    contents[RANKING] = texts[RANKING].encode()
    return [replace_file(folder / name, content) for name, content in contents.items()]
