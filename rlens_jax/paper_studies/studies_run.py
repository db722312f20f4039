"""Runs studies: open the session, load the model, encode the samples, then measure, plot and write study by study."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from rlens_jax.config import RunConfig
from rlens_jax.engine.scoring import Scoring
from rlens_jax.engine.session import ModelFolder, Session, encode_splits, load
from rlens_jax.engine.sizes import memory_explained
from rlens_jax.engine.startup import start
from rlens_jax.errors import UserError
from rlens_jax.files import replace_file
from rlens_jax.hosts.processes import Processes
from rlens_jax.paper_studies.layer_studies import layers_study, strategies_study, text_study
from rlens_jax.paper_studies.reduction_studies import fraction_study, probes_study, pruning_study, range_study
from rlens_jax.paper_studies.search_studies import search_methods_study
from rlens_jax.paper_studies.study import Facts, Panel, Study, StudyName, Variant, study_json
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.paper_studies.study_programs import make_scoring
from rlens_jax.plans import Operator
from rlens_jax.reporting.plots import Format, drawn
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
    "search_methods": search_methods_study,
}

_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", "--", "v"),
    ("#56B4E9", "-.", "P"),
    ("#6E6E6E", ":", "X"),
)
"""Color, line and marker per series: Okabe and Ito's colors, which differ for any color vision; lines and markers differ too."""


def run_studies(names: Sequence[StudyName], config: RunConfig, ranking: Path | None, *, restart: bool = False) -> list[Study]:
    """Measure the studies one after another; the files of each are written when it is finished.

    Measurements in the folder's journal, from an earlier command of the same configuration and any study, are not repeated.

    Args:
        names: the studies.
        config: the configuration, as of a ranking run.
        ranking: ranking.json of a finished run, with the orders of layers; None searches for them.
        restart: rename a journal of another configuration, and start again.

    Raises:
        UserError: bad input of any kind.
    """
    output, processes = config.folder, Processes()
    # The text control and token pruning need prompts in rows of their own.
    config = replace(config, compute=replace(config.compute, sharing=False))
    folder = ModelFolder.find(config.model)
    start(config.compute, output, processes, folder.path)
    # A ranking that cannot be used leaves no run folder behind.
    orders = {} if ranking is None else read_orders(ranking, folder.weights_hash)
    with Session.open(folder, config, processes, restart=restart) as session, memory_explained(config.compute):
        config = session.config
        bench = _bench(config, session, orders)
        facts = Facts(
            model=config.model,
            model_hash=folder.weights_hash,
            num_layers=bench.num_layers,
            data_hash=session.data_hash,
            samples=bench.samples,
            dense=bench.dense(bench.measure("dense model", [])),
            configuration=config.portable(),
            versions=versions(),
        )
        studies = []
        for name in names:
            studies.append(STUDIES[name](bench))
            write_study(studies[-1], facts, output)
    return studies


def read_orders(path: Path, model_hash: str) -> dict[Operator, tuple[int, ...]]:
    """The order of layers per operator in a ranking.json. UserError unless it ranks the model with this hash."""
    ranking = read_ranking(path)
    if ranking.model_hash != model_hash:
        raise UserError(f"{path} ranks the layers of another model; name one of this model")
    return ranking.orders


def _bench(config: RunConfig, session: Session, orders: Mapping[Operator, tuple[int, ...]]) -> Bench:
    """Load the model and encode the samples."""
    loaded = load(session)
    splits = encode_splits(session, loaded, loaded.programs(config))

    def scoring_of(variant: Variant) -> Scoring:
        return make_scoring(loaded.module, loaded.mesh, variant, config.seed, loaded.preparer.chat.stop_tokens)

    return Bench(config, session.folder.kind.config.decoder, splits, session.journal, scoring_of, orders)


def write_study(study: Study, facts: Facts, folder: Path) -> None:
    """Write the study's plots and then its JSON file, whose presence means that the study is complete."""
    for kind in ("png", "svg"):
        replace_file(folder / f"{study.name}.{kind}", plot_study(study, facts, kind))
    replace_file(folder / f"{study.name}.json", study_json(study, facts).encode())


def plot_study(study: Study, facts: Facts, kind: Format) -> bytes:
    """The panels of a study side by side, the score on the y axis, as PNG or SVG bytes."""
    return drawn(lambda: _figure(study, facts), kind)


def _figure(study: Study, facts: Facts) -> Figure:
    count = len(study.panels)
    figure = Figure(figsize=(max(6.4, 1 + 4.4 * count), 4.9), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, study.panels, strict=True):
        _panel(axis, panel, study, facts)
    axes[0].set_ylabel("held-out score, mean over the datasets (%)")
    legend = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, frameon=False)
    samples = sum(facts.samples.values())
    figure.suptitle(f"{study.question}\n{samples} held-out samples; bands: 95 % bootstrap interval", fontsize=10)
    return figure


def _panel(axis: Axes, panel: Panel, study: Study, facts: Facts) -> None:
    axis.axhline(sum(facts.dense.values()) / len(facts.dense), color="black", linestyle=":", linewidth=1.2, label="dense model")
    if panel.free is not None:
        axis.axvspan(*panel.free, color="#F0E442", alpha=0.35, linewidth=0, label="the last layer: free")
    for number, series in enumerate(panel.series):
        color, line, marker = _STYLES[number % len(_STYLES)]
        x = [point.x for point in series.points]
        mean, low, high = zip(*((point.mean, point.low, point.high) for point in series.points), strict=True)
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axis.plot(x, mean, color=color, linestyle=line, linewidth=1.6, marker=marker, markersize=4.5, label=series.name)
    axis.set_title(panel.title)
    axis.set_xlabel(study.x_label)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    _scale(axis, study, sorted({point.x for series in panel.series for point in series.points}))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: Axes, study: Study, values: list[float]) -> None:
    if study.x_scale == "percent":
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    elif study.x_scale == "log":
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif all(math.floor(value) == value for value in values):
        axis.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True))
