"""Run the paper's studies.

NAME is one of
  layers      score against the number of reduced layers: attention, FFN, both; the last layer's free part is shown separately
  text        the control: the same reductions on the prompt's text (simulated); ratio of score lost, text over visual
  fraction    share of the FFN units that visual tokens keep, 5 to 50 %
  range       attention range, from P / 64 to P visual tokens
  strategies  orders of layers: searched, by position, hybrid, random
  probes      number of probes, strided or random
  pruning     FastV, VTW and combinations with the reductions: score against FLOPs
  search_methods  greedy search and one-shot ranking: agreement, score, work
  all         all of them; on the embedded model less than 20 minutes on two CPU cores

Each study writes NAME.json (schema: rlens_jax/paper_studies/study.schema.json), NAME.png and NAME.svg to the output folder.
All measurements are kept in the folder's journal: a killed command resumes there, and studies share measurements. Without
options the preset `studies` is used: the embedded model.
"""

from collections.abc import Sequence

from rlens_jax.commands.options import RunParser, add_restart_option, input_file
from rlens_jax.config import RunConfig
from rlens_jax.console import run_command, show
from rlens_jax.errors import UserError, suggest
from rlens_jax.hosts.cluster import is_distributed
from rlens_jax.paper_studies.study import STUDY_NAMES
from rlens_jax.search.ranking_file import read_ranking

ALL = "all"


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print."""
    usage = "NAME [--ranking FILE] [--output DIR] [--model FOLDER]"
    parser = RunParser("python -m rlens_jax.studies", usage, __doc__, preset="studies", output="runs/studies")
    parser.add_argument("name", metavar="NAME", nargs="?", help="the study, or `all`")
    ranking_help = "ranking.json of a finished run of the same model, with the orders of layers (default: search for them)"
    parser.add_argument("--ranking", metavar="FILE", type=input_file, help=ranking_help)
    add_restart_option(parser)
    options, config = parser.parse_run(arguments)
    known = (*STUDY_NAMES, ALL)
    if options.name not in known:
        name = options.name
        missing = f"there is no study {name!r}{suggest(name, known)}" if name else "NAME is missing"
        raise UserError(f"{missing}; choose one of {', '.join(known)}")
    names = STUDY_NAMES if options.name == ALL else (options.name,)
    _check(config, names)
    if options.ranking is not None:
        read_ranking(options.ranking)
    from rlens_jax.paper_studies.studies_run import run_studies
    from rlens_jax.paper_studies.study import summary

    show(summary(run_studies(names, config, options.ranking, restart=options.restart), config.folder))


def _check(config: RunConfig, names: Sequence[str]) -> None:
    if is_distributed(config.hosts):
        raise UserError("studies run in one process; set --hosts.num_processes 1, or start them on one host")
    if config.search.objective != "teacher_forced":
        raise UserError("search.objective must be teacher_forced: studies score by teacher forcing only")
    if config.search.base_attention or config.search.base_ffn:
        raise UserError("search.base_attention and search.base_ffn must be empty: studies rank from the dense model")
    if config.compute.model_shards > 1 and "text" in names:
        raise UserError("compute.model_shards must be 1 for the study text: its control is simulated on whole weights")


if __name__ == "__main__":
    run_command(main)
