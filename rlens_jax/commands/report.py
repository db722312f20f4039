"""Write the HTML report of finished ranking runs, side by side if there are several.

The report is one file that needs no network. It is made from each folder's ranking.json, timing.json and, if present,
examples.json. Without --output, it is report.html in the run's folder or, for several runs, in the current folder.
--output is a folder, as in every command, or a file that ends with .html.
"""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.commands.options import new_file, new_folder
from rlens_jax.console import ArgumentParser, run_command, show
from rlens_jax.files import replace_file
from rlens_jax.mirrors import fetched_run, place
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.run_files import read_run


def main(arguments: Sequence[str]) -> None:
    """Parse, write, print the path."""
    parser = ArgumentParser("python -m rlens_jax.report", __doc__)
    parser.add_argument("folders", metavar="DIR", type=_run, nargs="+", help="output folder of a finished run of rlens_jax.rank")
    parser.add_argument("--output", metavar="DIR", type=_report_file, help="folder for report.html, or a file NAME.html")
    options = parser.parse_args(arguments)
    folders = options.folders
    page = report_html([read_run(folder) for folder in folders])
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    show(str(replace_file(output, page.encode())))


def _run(text: str) -> Path:
    return fetched_run(place(text))


def _report_file(text: str) -> Path:
    return new_file(text) if Path(text).suffix == ".html" else new_folder(text) / "report.html"


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was written")
