"""A finished run as values: everything the report shows, and nothing that computes it.

All that is in `Results` is decided by configuration, model and data, but for `Timing`, which holds whatever
differs from one run to the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rlens_jax.config import RunConfig
from rlens_jax.plan import Operator, Plan
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.objective import comparable
from rlens_jax.search.search import Ranking

Strategy = Literal["searched", "search_all", "position", "random"]
Metrics = Mapping[str, float]
"""Dataset -> metric."""

ALLOWED_LOSS = 0.01
"""What the report calls no loss worth speaking of: less than 1 % (our decision)."""


@dataclass(frozen=True)
class Curve:
    """How the held-out score falls as an order's layers are reduced one after another.

    Attributes:
      order: the layers, the first to reduce first.
      metrics: each dataset's metric with the first 0, 1, ... L layers reduced.
      losses: the loss against the dense model at the same points.
      mean: the mean over the datasets, with its bootstrap interval, float64[L + 1].
    """

    order: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    losses: tuple[float, ...]
    mean: Interval

    @property
    def allowed(self) -> int:
        """The largest number of reduced layers with a loss below `ALLOWED_LOSS`; a smaller one may lose more."""
        return max(k for k, loss in enumerate(self.losses) if k == 0 or loss < ALLOWED_LOSS)


@dataclass(frozen=True)
class RandomCurves:
    """Held-out scores of random orders, at a few numbers of reduced layers.

    Attributes:
      orders: the random rankings.
      num_reduced: the numbers of reduced layers.
      means: per ranking, the mean over the datasets at each of them.
    """

    orders: tuple[tuple[int, ...], ...]
    num_reduced: tuple[int, ...]
    means: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Saving:
    """What a plan saves, and what it costs, on held-out samples.

    Attributes:
      plan: the layers reduced.
      loss: minus the mean over the datasets of the change against the dense model.
      flops: share of the dense prefill's multiply-adds saved, as the field counts (without probes).
      flops_with_probes: the same with the probes' work counted, which is what is really computed.
    """

    plan: Plan
    loss: float
    flops: float
    flops_with_probes: float


@dataclass(frozen=True)
class OperatorResult:
    """One operator's ranking and its held-out curves.

    Attributes:
      ranking: what the search found on the validation samples.
      curves: of the strategies that give one order; "searched" and "position" are always there.
      random: of random orders.
      area_points: the numbers of reduced layers over which areas are taken, the same for all strategies.
      areas: area under the curve per strategy; random is the mean of its rankings.
      margins: area of "searched" minus that of each other strategy, drawn on the same samples.
      saving: with the first `curves["searched"].allowed` layers reduced.
    """

    ranking: Ranking
    curves: Mapping[Strategy, Curve]
    random: RandomCurves
    area_points: tuple[int, ...]
    areas: Mapping[Strategy, Interval]
    margins: Mapping[Strategy, Interval]
    saving: Saving

    @property
    def beats(self) -> dict[Strategy, bool]:
        """Whether the searched order is better than each other strategy, beyond the 95 % interval."""
        return {name: float(margin.low) > 0 for name, margin in self.margins.items()}

    @property
    def tied_share(self) -> float:
        """Share of a round's other candidates that scored as well as the winner, mean over the rounds."""
        shares = [len(r.ties) / (len(r.layers) - 1) for r in self.ranking.rounds if len(r.layers) > 1]
        return sum(shares) / len(shares) if shares else 0.0

    def first_round_spread(self, samples: Mapping[str, int]) -> float:
        """By how many right samples the best and the worst candidate of the first round differ."""
        if not self.ranking.rounds:
            return 0.0
        scores = self.ranking.rounds[0].scores
        best = max(scores, key=lambda score: comparable(score.score))
        worst = min(scores, key=lambda score: comparable(score.score))
        return sum((best.metrics[name] - worst.metrics[name]) * size for name, size in samples.items())


@dataclass(frozen=True)
class PrefillTime:
    """Times of one prefill, measured side by side: the dense model's, and with a plan's work skipped.

    Attributes:
      dense, reduced: seconds, one value a repeat.
      samples, text_slots, visual_slots: the batch that was timed, padding included.
    """

    dense: tuple[float, ...]
    reduced: tuple[float, ...]
    samples: int
    text_slots: int
    visual_slots: int

    @property
    def saved(self) -> float:
        """The share of the dense prefill's time that is saved, of the medians."""
        return 1 - median(self.reduced) / median(self.dense)


@dataclass(frozen=True)
class Timing:
    """What differs from one run of the same configuration to the next.

    Attributes:
      started: date and time, ISO 8601.
      device: the kind of device, and how many.
      num_devices: devices used.
      num_cores: CPU cores of the host.
      seconds: per phase of the run; of this process only, when the run was resumed.
      evaluations: made by this process.
      resumed: evaluations read from the journal.
      compilations: programs compiled by this process.
      prefill: measured for the plan of an operator's saving, or of "both".
    """

    started: str
    device: str
    num_devices: int
    num_cores: int
    seconds: Mapping[str, float]
    evaluations: int
    resumed: int
    compilations: int
    prefill: Mapping[str, PrefillTime]


@dataclass(frozen=True)
class Results:
    """A finished run.

    Attributes:
      config: what was asked for.
      model_hash, data_hash: of the weights and of the samples.
      num_layers: L.
      versions: package -> version.
      validation_samples, test_samples: dataset -> how many samples the search and the curves rest on.
      dense_validation, dense_test: the dense model's metrics on them.
      operators: per ranked operator.
      combined: both operators' layers reduced at once; None when only one was ranked.
      timing: this run's own.
    """

    config: RunConfig
    model_hash: str
    data_hash: str
    num_layers: int
    versions: Mapping[str, str]
    validation_samples: Mapping[str, int]
    test_samples: Mapping[str, int]
    dense_validation: Metrics
    dense_test: Metrics
    operators: Mapping[Operator, OperatorResult]
    combined: Saving | None
    timing: Timing

    @property
    def savings(self) -> dict[str, Saving]:
        """Per operator, and for "both" at once."""
        savings: dict[str, Saving] = {name: result.saving for name, result in self.operators.items()}
        return savings if self.combined is None else {**savings, "both": self.combined}
