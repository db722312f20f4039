"""A finished study as values: everything that its JSON file and its plot show, and nothing that computes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rlens_jax.paper_studies.cases import Case

StudyName = Literal["layers", "text", "fraction", "range", "strategies", "probes", "pruning"]
STUDY_NAMES: tuple[StudyName, ...] = get_args(StudyName)

Bound = float | Literal["infinite", "undefined"]
"""A number, or what a ratio can be instead of one; see `Finding`."""


@dataclass(frozen=True)
class Flops:
    """Share of the dense prefill's multiply-adds that a case saves, mean over the held-out samples.

    Attributes:
      saved: as the field counts, without the probes.
      with_probes: with the probes' work, which is what is really computed.
      last_layer: the part of `saved` that the last layer has. It is free: what a visual token leaves there reaches no
        answer, and any implementation, dense too, may leave it out.
    """

    saved: float
    with_probes: float
    last_layer: float


@dataclass(frozen=True)
class Point:
    """A measured point of a series.

    Attributes:
      x: place on the study's x axis.
      case: what was measured; None for the mean over several orders of layers.
      metrics: of each dataset.
      loss: minus the mean over the datasets of the change against the dense model.
      mean, low, high: mean of the datasets' metrics, with its 95 % bootstrap interval.
      flops: None where nothing is saved because the reduction is only simulated, and where there is no single case.
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
      name: what the legend calls it.
      points: by ascending x.
      orders: the orders of layers behind it; several for the mean of random orders. Empty where x is no number of layers.
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
      free: the step of x in which nothing but the last layer is reduced, shown apart; None if there is none.
    """

    title: str
    series: tuple[Series, ...]
    free: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """A number that a study was made for, with its 95 % bootstrap interval where it has one.

    A ratio of two losses is "infinite" when only the upper one is a loss, and "undefined" when neither is.
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
      name: of the command.
      question: what is asked, in one line.
      x_label: what x is, with its unit.
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
    """What all studies of a folder rest on.

    Attributes:
      model, model_hash, num_layers: of the model.
      data_hash, samples: of the samples; how many held-out ones each dataset has.
      dense: the dense model's metrics on them.
      configuration: of the run, as JSON values.
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
