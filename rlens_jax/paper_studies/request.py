"""What a command line asks of `rlens_jax.studies`, beside the fields of a run's configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rlens_jax.config import RunConfig, load_config
from rlens_jax.errors import UserError, suggest
from rlens_jax.hosts.cluster import several

StudyName = Literal["layers", "text", "fraction", "range", "strategies", "probes", "pruning"]
STUDY_NAMES: tuple[StudyName, ...] = get_args(StudyName)
ALL = "all"
PRESET, OUTPUT = "studies", "runs/studies"

OPTIONS = {
    "--ranking": "ranking.json of a finished run of the same model: the orders of layers are taken from it, not searched."
}
"""What each option does."""


@dataclass(frozen=True)
class Request:
    """Which studies, on what, along which orders of layers."""

    names: tuple[StudyName, ...]
    config: RunConfig
    ranking: Path | None


def read_request(arguments: Sequence[str]) -> Request:
    """The request of a command line: NAME, --ranking, and options of `rlens_jax.rank`.

    Raises:
        UserError: no study of that name, or an option that is wrong or asks for what studies do not do.
    """
    name, *rest = arguments or [""]
    known = (*STUDY_NAMES, ALL)
    if name not in known:
        missing = f"no study is called {name!r}{suggest(name, known)}" if name else "say which study"
        raise UserError(f"{missing}; there are {', '.join(known)}")
    ranking, left = _take_ranking(rest)
    options = {option.partition("=")[0] for option in left}
    preset = () if "--config" in options else ("--config", PRESET)
    output = () if "--output" in options else ("--output", OUTPUT)
    config = load_config([*preset, *output, *left], OPTIONS)
    _check(config, name)
    names = STUDY_NAMES if name == ALL else tuple(study for study in STUDY_NAMES if study == name)
    return Request(names, config, ranking)


def _take_ranking(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    ranking, left, rest = None, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option != "--ranking":
            left.append(argument)
        elif not equals and not rest:
            raise UserError("option --ranking needs a value")
        else:
            ranking = Path(value if equals else rest.pop(0))
    return ranking, left


def _check(config: RunConfig, name: str) -> None:
    if several(config.hosts):
        raise UserError("studies run in one process; set --hosts.num_processes 1, or start them on one host")
    if config.search.objective != "teacher_forced":
        raise UserError("search.objective must be teacher_forced: studies score by teacher forcing only")
    if config.search.base_attention or config.search.base_ffn:
        raise UserError("search.base_attention and search.base_ffn must be empty: studies rank from the dense model")
    if config.compute.model_shards > 1 and name in ("text", ALL):
        raise UserError("compute.model_shards must be 1 for the study text: its control is simulated on whole weights")
