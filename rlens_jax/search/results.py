"""A finished run as values: everything that reports show.

Configuration, model and data decide all of `Results` except `Timing`, which holds what differs between runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rlens_jax.config import RunConfig
from rlens_jax.plans import Operator, Plan
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.front import Front, PrefillTime
from rlens_jax.search.objective import Metrics, comparable
from rlens_jax.search.search import Ranking

Strategy = Literal["searched", "search_all", "position", "random"]

ALLOWED_LOSS = 0.01
"""Losses below this count as none in reports: 1 % (our decision)."""


@dataclass(frozen=True)
class Curve:
    """The held-out score as the layers of an order are reduced one after another.

    Attributes:
        order: the layers, the first to reduce first.
        metrics: metrics per dataset with the first 0, 1, ... L layers reduced.
        losses: losses against the dense model at the same points.
        mean: mean over the datasets with its bootstrap interval, float64[L + 1].
    """

    order: tuple[int, ...]
    metrics: tuple[Metrics, ...]
    losses: tuple[float, ...]
    mean: Interval

    @property
    def allowed(self) -> int:
        """The largest number of reduced layers with a loss below `ALLOWED_LOSS`; smaller numbers may lose more."""
        return max(k for k, loss in enumerate(self.losses) if k == 0 or loss < ALLOWED_LOSS)


@dataclass(frozen=True)
class RandomCurves:
    """Held-out scores of random orders, at a few numbers of reduced layers.

    Attributes:
        orders: the random rankings.
        num_reduced: the numbers of reduced layers.
        means: mean over the datasets, per ranking and number.
    """

    orders: tuple[tuple[int, ...], ...]
    num_reduced: tuple[int, ...]
    means: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Saving:
    """The saving of a plan and its loss on held-out samples.

    Attributes:
        plan: the reduced layers.
        loss: minus the mean change against the dense model, over the datasets.
        flops: share of the dense prefill's multiply-adds that is saved, without the probes' work, as is usual.
        flops_with_probes: the same with the probes' work, which is computed as well.
    """

    plan: Plan
    loss: float
    flops: float
    flops_with_probes: float


@dataclass(frozen=True)
class OperatorResult:
    """The ranking of one operator and its held-out curves.

    Attributes:
        ranking: the result of the search on the validation samples.
        curves: curves of the strategies with one order; always "searched" and "position".
        random: curves of random orders, which may be none.
        area_points: the numbers of reduced layers over which areas are taken, the same for all strategies.
        areas: area under the curve per strategy; for random, of the mean of its rankings, if there are any.
        margins: area of "searched" minus the area of each other strategy, on the same draws.
        saving: saving of the first `curves["searched"].allowed` layers.
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
        """Share of the other candidates of a round with the winner's score, mean over the rounds."""
        shares = [len(r.ties) / (len(r.layers) - 1) for r in self.ranking.rounds if len(r.layers) > 1]
        return sum(shares) / len(shares) if shares else 0.0

    def first_round_spread(self, samples: Mapping[str, int]) -> float:
        """Difference between the best and the worst candidate of the first round, in right samples; at least, if some stopped
        early.
        """
        if not self.ranking.rounds:
            return 0.0
        scores = self.ranking.rounds[0].scores
        best = max(scores, key=lambda score: comparable(score.score))
        worst = min(scores, key=lambda score: comparable(score.score))
        return sum((best.metrics[name] - worst.metrics[name]) * size for name, size in samples.items())


@dataclass(frozen=True)
class Buckets:
    """The static shapes of a run, configured or chosen from the data.

    Attributes:
        rows: text and visual slots.
        images: patches, or views and patches.
        padding: share of the slots of all rows that is padding.
    """

    rows: tuple[tuple[int, int], ...]
    images: tuple[tuple[int, ...], ...]
    padding: float


@dataclass(frozen=True)
class Timing:
    """Everything that differs between two runs of one configuration.

    Attributes:
        started: date and time, ISO 8601.
        device: device kind.
        num_devices: number of devices used.
        num_cores: number of CPU cores of the host.
        seconds: seconds per phase; of this process only, if the run was resumed.
        evaluations: number of samples that this process evaluated, counted once per plan.
        resumed: number of those that it read from the journal.
        peak_memory_bytes: the most memory in use so far on a device of this process; None where devices do not tell.
        compilations: number of programs compiled by this process.
        batch_size: rows per batch of a work group.
        prefill: prefill times per plan of `Results.savings`, if measured.
    """

    started: str
    device: str
    num_devices: int
    num_cores: int
    seconds: Mapping[str, float]
    evaluations: int
    resumed: int
    peak_memory_bytes: int | None
    compilations: int
    batch_size: int
    prefill: Mapping[str, PrefillTime]


@dataclass(frozen=True)
class Searched:
    """A run whose searches have ended, all or some of them, before anything was evaluated on held-out samples.

    Attributes:
        config: configuration of the run.
        model_hash, data_hash: hashes of the weights and of the samples.
        num_layers: L.
        buckets: static shapes of the rows and images.
        versions: version per package.
        validation_samples, test_samples: number of samples per dataset, for the search and for the curves.
        dense_validation: metrics of the dense model on the validation samples.
        rankings: the rankings found; each is final.
        provisional: whether the run goes on: other rankings or the held-out curves are to come.
        timing: times of this run.
    """

    config: RunConfig
    model_hash: str
    data_hash: str
    num_layers: int
    buckets: Buckets
    versions: Mapping[str, str]
    validation_samples: Mapping[str, int]
    test_samples: Mapping[str, int]
    dense_validation: Metrics
    rankings: Mapping[Operator, Ranking]
    provisional: bool
    timing: Timing

    def timed(self, prefill: Mapping[str, PrefillTime]) -> "Searched":
        """The same run with measured prefill times."""
        return replace(self, timing=replace(self.timing, prefill=prefill))


@dataclass(frozen=True)
class Results(Searched):
    """A finished run with its held-out curves.

    Attributes:
        dense_test: metrics of the dense model on the held-out samples.
        operators: results per ranked operator.
        combined: saving of both operators at once; None if only one was ranked.
        front: the best plan under the budget of the configuration; None without one.
        divergences: if plans were scored by KL, the largest KL(dense || plan) in nats at one token of a validation answer, by
            the names of `savings`.
    """

    dense_test: Metrics
    operators: Mapping[Operator, OperatorResult]
    combined: Saving | None
    front: Front | None = None
    divergences: Mapping[str, float] = field(default_factory=dict)

    @property
    def savings(self) -> dict[str, Saving]:
        """The saving per operator, and of "both" at once."""
        savings: dict[str, Saving] = {name: result.saving for name, result in self.operators.items()}
        return savings if self.combined is None else {**savings, "both": self.combined}
