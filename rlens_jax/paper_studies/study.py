"""A study as values, and its results as JSON and as text for the terminal. Nothing here computes them.

The JSON, which `study.schema.json` describes, holds nothing that differs between runs of a configuration.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlens_jax.files import json_text
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import Pruning, pruning_fields

SCHEMA = "rlens-study/1"

Tokens = Literal["visual", "text"]

StudyName = Literal["layers", "text", "fraction", "range", "strategies", "probes", "pruning", "search_methods"]
STUDY_NAMES: tuple[StudyName, ...] = get_args(StudyName)

Bound = float | Literal["infinite", "undefined"]
"""A number, or a ratio that is not a number; see `Finding`."""


@dataclass(frozen=True)
class Variant:
    """How the reduced layers of a plan treat tokens. Each variant has its own compiled programs.

    Attributes:
      reduction: range, fractions and probes.
      tokens: which tokens are reduced. "text" is the simulated control (`rlens_jax.paper_studies.study_programs`).
      pruning: how visual tokens are dropped in addition; None keeps all.
    """

    reduction: Reduction
    tokens: Tokens = "visual"
    pruning: Pruning | None = None

    def key(self) -> str:
        """A unique name for the journal."""
        pruning = None if self.pruning is None else self.pruning.label()
        return json.dumps({**asdict(self), "pruning": pruning}, sort_keys=True)


@dataclass(frozen=True)
class Case:
    """A plan under a variant, which a study measures."""

    plan: Plan
    variant: Variant


@dataclass(frozen=True)
class Flops:
    """Share of the dense prefill's multiply-adds that a case saves, mean over the held-out samples.

    Attributes:
      saved: as the field counts, without the probes.
      with_probes: with the probes' work, as computed.
      last_layer: the part of `saved` in the last layer. It is free: the last layer's output for a visual token reaches no answer,
        so any implementation, even a dense one, may skip it.
    """

    saved: float
    with_probes: float
    last_layer: float


@dataclass(frozen=True)
class Point:
    """A measured point of a series.

    Attributes:
      x: position on the study's x axis.
      case: what was measured; None for the mean over several orders of layers.
      metrics: metric of each dataset.
      loss: minus the mean over the datasets of the change against the dense model.
      mean, low, high: mean of the datasets' metrics, with its 95 % bootstrap interval.
      flops: None if the reduction is only simulated, and for the mean over several orders.
    """

    x: float
    case: Case | None
    metrics: Mapping[str, float]
    loss: float
    mean: float
    low: float
    high: float
    flops: Flops | None


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
      name: the legend's text.
      points: by ascending x.
      orders: the orders of layers behind it; several for the mean of random orders. Empty if x is not a number of layers.
    """

    name: str
    points: tuple[Point, ...]
    orders: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One plot of a study.

    Attributes:
      title: what is reduced.
      series: the lines.
      free: the step of x that reduces only the last layer, which is marked; None if there is none.
    """

    title: str
    series: tuple[Series, ...]
    free: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """A number that answers the study's question, with its 95 % bootstrap interval if it has one.

    A ratio of two losses is "infinite" if only the upper one is a loss, and "undefined" if neither is.
    """

    name: str
    statement: str
    value: Bound
    low: Bound | None = None
    high: Bound | None = None


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
      name: the command's NAME.
      question: the question, in one line.
      x_label: the quantity on the x axis, with its unit.
      x_scale: "linear", "percent" (x is a share, shown in %) or "log" (the values of x are marked).
      panels, findings: the answer.
    """

    name: str
    question: str
    x_label: str
    x_scale: Literal["linear", "percent", "log"]
    panels: tuple[Panel, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Facts:
    """Facts that all studies of a folder share.

    Attributes:
      model, model_hash, num_layers: the model.
      data_hash: hash of the samples.
      samples: number of held-out samples of each dataset.
      dense: the dense model's metrics on them.
      configuration: the run's configuration, as JSON values.
      versions: package -> version.
    """

    model: str
    model_hash: str
    num_layers: int
    data_hash: str
    samples: Mapping[str, int]
    dense: Mapping[str, float]
    configuration: Mapping[str, object]
    versions: Mapping[str, str]


def study_json(study: Study, facts: Facts) -> str:
    """The text of a study's JSON file."""
    return json_text(
        {
            "schema": SCHEMA,
            "study": study.name,
            "question": study.question,
            "x": {"label": study.x_label, "scale": study.x_scale},
            "panels": [_panel(panel) for panel in study.panels],
            "findings": [asdict(finding) for finding in study.findings],
            "model": {"path": facts.model, "hash": facts.model_hash, "num_layers": facts.num_layers},
            "data": {"hash": facts.data_hash, "samples": dict(facts.samples)},
            "dense": dict(facts.dense),
            "configuration": dict(facts.configuration),
            "versions": dict(facts.versions),
        }
    )


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "free_step": None if panel.free is None else list(panel.free),
        "series": [
            {
                "name": series.name,
                "orders": [list(order) for order in series.orders],
                "points": [_point(point) for point in series.points],
            }
            for series in panel.series
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "x": point.x,
        "mean": point.mean,
        "low": point.low,
        "high": point.high,
        "loss": point.loss,
        "metrics": dict(point.metrics),
        "flops": None if point.flops is None else asdict(point.flops),
        "case": None if point.case is None else _case(point.case),
    }


def _case(case: Case) -> dict[str, Any]:
    variant = case.variant
    return {
        "attention": list(case.plan.attention),
        "ffn": list(case.plan.ffn),
        "reduction": asdict(variant.reduction),
        "tokens": variant.tokens,
        "pruning": pruning_fields(variant.pruning),
    }


def summary(studies: Sequence[Study], folder: Path) -> str:
    """The findings of each study, or its points if it has no findings, and the names of its files."""
    lines = []
    for study in studies:
        lines.append(f"{study.name}: {study.question}")
        lines += [f"  {_finding_line(finding)}" for finding in study.findings]
        if not study.findings:
            lines.append(f"  {study.x_label}: held-out score in %")
            scale = 100 if study.x_scale == "percent" else 1
            lines += [f"  {_series_line(series, scale)}" for panel in study.panels for series in panel.series]
        lines += [f"  -> {folder / study.name}.json, .png, .svg", ""]
    return "\n".join(lines).rstrip()


def _finding_line(finding: Finding) -> str:
    text = f"{finding.statement}: {_shown(finding.value)}"
    if finding.low is None or finding.high is None:
        return text
    return f"{text} (95 %: {_shown(finding.low)} to {_shown(finding.high)})"


def _shown(bound: Bound) -> str:
    return bound if isinstance(bound, str) else f"{bound:.4g}"


def _series_line(series: Series, scale: int) -> str:
    points = "  ".join(f"{scale * point.x:.3g}: {100 * point.mean:.1f}" for point in series.points)
    return f"{series.name}: {points}"
