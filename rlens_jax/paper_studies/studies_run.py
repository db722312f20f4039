"""Runs studies: open the session, load the model, encode the samples, then measure and write study by study."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rlens_jax.config import RunConfig
from rlens_jax.engine.programs import Programs, run_layers
from rlens_jax.engine.scoring import Scoring, TeacherForcing
from rlens_jax.engine.session import Session, encode_splits, load, start
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.errors import UserError
from rlens_jax.files import replace_file
from rlens_jax.hosts.processes import Processes
from rlens_jax.paper_studies.layer_studies import layers_study, strategies_study, text_study
from rlens_jax.paper_studies.pruned_forcing import PrunedForcing
from rlens_jax.paper_studies.reduction_studies import fraction_study, probes_study, pruning_study, range_study
from rlens_jax.paper_studies.study import Facts, Study, StudyName, Variant, study_json
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.paper_studies.study_plots import plot_study
from rlens_jax.paper_studies.text_control import run_text_layers
from rlens_jax.plan import Operator
from rlens_jax.resources import versions
from rlens_jax.search.ranking_file import read_ranking

STUDIES: Mapping[StudyName, Callable[[Bench], Study]] = {
    "layers": layers_study,
    "text": text_study,
    "fraction": fraction_study,
    "range": range_study,
    "strategies": strategies_study,
    "probes": probes_study,
    "pruning": pruning_study,
}


def run_studies(names: Sequence[StudyName], config: RunConfig, ranking: Path | None) -> list[Study]:
    """Measure the studies one after another; the files of each are written when it is finished.

    Measurements in the folder's journal, from an earlier command of the same configuration and any study, are not repeated.

    Args:
        names: the studies.
        config: the configuration, as of a ranking run.
        ranking: ranking.json of a finished run, with the orders of layers; None searches for them.

    Raises:
        UserError: bad input of any kind.
    """
    output, processes = Path(config.output), Processes()
    start(config.compute, output, processes)
    with (
        Session.open(config.model, output, config.data, config.deciding_settings(), processes, seed=config.seed) as session,
        memory_explained(config.compute.batch_size, config.compute.model_shards),
    ):
        orders = {} if ranking is None else read_orders(ranking, session.folder.weights_hash)
        bench = _bench(config, session, orders)
        facts = _facts(config, session, bench)
        studies = []
        for name in names:
            studies.append(STUDIES[name](bench))
            write_study(studies[-1], facts, output)
    return studies


def _bench(config: RunConfig, session: Session, orders: Mapping[Operator, tuple[int, ...]]) -> Bench:
    """Load the model and encode the samples."""
    loaded = load(session.folder, config.compute, config.reduction, config.search)
    model, mesh, stop = loaded.module, loaded.mesh, loaded.preparer.chat.stop_token
    encoder = loaded.programs(config.reduction, seed=config.seed, new_tokens=1)
    splits = encode_splits(session, loaded, encoder, with_answers=True)

    def scoring_of(variant: Variant) -> Scoring:
        return make_scoring(model, mesh, variant, config.seed, stop)

    return Bench(config, session.folder.kind.config.decoder, splits, session.journal, scoring_of, orders)


def _facts(config: RunConfig, session: Session, bench: Bench) -> Facts:
    return Facts(
        model=config.model,
        model_hash=session.folder.weights_hash,
        num_layers=bench.num_layers,
        data_hash=session.data_hash,
        samples=bench.samples,
        dense=bench.dense(bench.measure("dense model", [])),
        configuration=config.portable(),
        versions=versions(),
    )


def read_orders(path: Path, model_hash: str) -> dict[Operator, tuple[int, ...]]:
    """The order of layers per operator in a ranking.json. UserError unless it ranks the model with this hash."""
    ranking = read_ranking(path)
    if ranking.model_hash != model_hash:
        raise UserError(f"{path} ranks the layers of another model; name one of this model")
    return ranking.orders


def make_scoring(model: Any, mesh: Mesh, variant: Variant, seed: int, stop_token: int) -> Scoring:
    """The scoring that evaluates plans under a variant."""
    layers = run_text_layers if variant.tokens == "text" else run_layers
    programs = Programs(model, mesh, variant.reduction, seed=seed, new_tokens=1, stop_token=stop_token, run_layers=layers)
    return TeacherForcing(programs) if variant.pruning is None else PrunedForcing(programs, variant.pruning)


def write_study(study: Study, facts: Facts, folder: Path) -> None:
    """Write the study's plots and then its JSON file, whose presence means that the study is complete."""
    for kind in ("png", "svg"):
        replace_file(folder / f"{study.name}.{kind}", plot_study(study, facts, kind))
    replace_file(folder / f"{study.name}.json", study_json(study, facts).encode())
