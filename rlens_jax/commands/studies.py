"""The paper's studies: `python -m rlens_jax.studies NAME [--output DIR] [--ranking FILE] [--model FOLDER] [--GROUP.FIELD VALUE]`.

NAME is one of
  layers      score against the number of reduced layers: attention, FFN, both; the last layer's free part shown apart
  text        the control: the same reductions on the prompt's text (simulated); score lost, text over visual
  fraction    share of the FFN units that visual tokens keep, 5 to 50 %
  range       attention range, from P / 64 to P visual tokens
  strategies  orders of layers: searched, by position, hybrid, random
  probes      how many probes, strided or random
  pruning     alone, FastV, VTW and combinations: score against FLOPs
  all         all of them; on the embedded model less than 20 minutes on two CPU cores

Each writes NAME.json (schema:
rlens_jax/paper_studies/study.schema.json) and NAME.png and .svg into DIR, runs/studies by default. All
that is measured is kept in DIR's journal: a killed command goes on from there, and studies share what they have in common.
--ranking takes the orders of layers from the ranking.json of a finished run; otherwise they are searched, on the validation
samples. All other options are those of `python -m rlens_jax.rank`; without any, the preset `studies`: the embedded model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rlens_jax.console import run_command
from rlens_jax.paper_studies.request import read_request


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        sys.exit(0)
    request = read_request(arguments)
    from rlens_jax.paper_studies.studies_run import run_studies
    from rlens_jax.paper_studies.study_summary import summary

    studies = run_studies(request.names, request.config, request.ranking)
    print(summary(studies, Path(request.config.output)))


if __name__ == "__main__":
    run_command(main)
