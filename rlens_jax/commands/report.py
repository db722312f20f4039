"""The HTML report of finished ranking runs: `python -m rlens_jax.report DIR [DIR ...] [--output FILE]`.

One file that opens from disk and needs no network; of several runs, side by side. It is made of the folders' ranking.json,
timing.json and, where there is one, examples.json. Without --output: report.html in the folder of a single run, and in the
current folder for several. Exit code 2 with one line for bad input.
"""

from collections.abc import Sequence
from pathlib import Path

from rlens_jax.console import ArgumentParser, run_command
from rlens_jax.files import replace_file
from rlens_jax.reporting.reading import read_run
from rlens_jax.reporting.report_page import report_html


def main(arguments: Sequence[str]) -> None:
    """Read, write, say where."""
    parser = ArgumentParser("python -m rlens_jax.report", __doc__)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="output folder of a finished run of rlens_jax.rank")
    parser.add_argument("--output", metavar="FILE", help="the report")
    options = parser.parse_args(arguments)
    folders = [Path(name) for name in options.folders]
    page = report_html([read_run(folder) for folder in folders])
    beside = folders[0] if len(folders) == 1 else Path()
    print(replace_file(Path(options.output) if options.output else beside / "report.html", page.encode()))


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; nothing was written")
