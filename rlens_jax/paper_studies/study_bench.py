"""Measures the cases of studies with one model, its encoded samples and one journal, which all studies and variants share.

The vision tower runs once per sample. Cases in the journal are not measured again, and a variant whose cases are all there is
not even compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlens_jax.config import Measure, OneShotBy, RunConfig, SearchMethod
from rlens_jax.console import Progress
from rlens_jax.engine.evaluator import Evaluator, Outcomes
from rlens_jax.engine.fidelity import Fidelity
from rlens_jax.engine.inputs import Split
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.engine.scoring import Scoring
from rlens_jax.flops import layer_cost, prefill_cost, visual_in_layer
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.paper_studies.study import Case, Flops, Point, Series, Variant
from rlens_jax.plans import FULL, Level, Operator, Plan
from rlens_jax.search.bootstrap import Interval, Statistic, bootstrap_interval, mean_over_datasets
from rlens_jax.search.curves import chain_order
from rlens_jax.search.journal import Journal
from rlens_jax.search.objective import dataset_metrics, plan_loss
from rlens_jax.search.search import Ranking, num_evaluations, rank_layers

VALIDATION, TEST = "validation", "test"

Measured = Mapping[Case, Outcomes]


class Bench:
    """Measures cases on held-out samples, and searches on the validation samples.

    Args:
        config: the run's configuration.
        decoder: the decoder's configuration.
        splits: samples and batches of both splits.
        journal: holds finished evaluations.
        scoring_of: makes the scoring of a variant.
        orders: orders of layers by operator; a missing order is searched when it is first needed.
    """

    def __init__(
        self,
        config: RunConfig,
        decoder: DecoderConfig,
        splits: Mapping[str, Split],
        journal: Journal,
        scoring_of: Callable[[Variant], Scoring],
        orders: Mapping[Operator, tuple[int, ...]],
    ):
        self.config = config
        self.num_layers = decoder.num_layers
        self.plain = Variant(config.reduction)
        self._decoder = decoder
        self._splits = splits
        self._journal = journal
        self._scoring_of = scoring_of
        self._orders = dict(orders)
        self._scorings: dict[Variant, Scoring] = {}
        self._fidelity: Fidelity | None = None

    @property
    def most_visual(self) -> int:
        """Visual tokens of the held-out sample that has the most, P."""
        return int(self._splits[TEST].num_visual.max())

    @property
    def samples(self) -> dict[str, int]:
        """Held-out samples of each dataset."""
        return {name: len(members) for name, members in self._splits[TEST].datasets.items()}

    def order(self, operator: Operator) -> tuple[int, ...]:
        """The searched order of layers: from `orders`, else with the configured L_p."""
        if operator not in self._orders:
            search = self.config.search
            self._orders[operator] = self.search(operator, search.position_layers, search.method, search.one_shot_by).order
        return self._orders[operator]

    def search(
        self, operator: Operator, position_layers: int | None, method: SearchMethod = "greedy", one_shot_by: OneShotBy = "outcome"
    ) -> Ranking:
        """The Layer Ranking Algorithm on the validation samples; None is L // 4."""
        prior = self.num_layers // 4 if position_layers is None else position_layers
        search = self.config.search.by(method, one_shot_by)
        total = num_evaluations(self.num_layers, prior, method) + 1  # the dense plan is evaluated before the search, too
        label = f"ranking {operator}, L_p = {prior}"
        split, evaluator = self._search_evaluator(search.measure)
        with Progress(label, total, "candidates") as progress:
            (outcomes,) = evaluator.outcomes(split, Plan(), [Plan()], progress)
            score_round = RoundScorer(evaluator, split, dataset_metrics(outcomes), search, progress)
            ranking = rank_layers(self.num_layers, prior, operator, score_round, method=method)
        evaluator.scoring.release()
        return ranking

    def measure(self, label: str, cases: Sequence[Case]) -> Measured:
        """The outcomes of all cases, and of the dense model, on the held-out samples."""
        distinct = list(dict.fromkeys([Case(Plan(), self.plain), *map(self._canonical, cases)]))
        measured: dict[Case, Outcomes] = {}
        with Progress(label, len(distinct), "plans") as progress:
            for variant in dict.fromkeys(case.variant for case in distinct):
                evaluator, scoring = self._evaluator(TEST, variant)
                plans = chain_order([case.plan for case in distinct if case.variant == variant], self.num_layers)
                outcomes = evaluator.chain(self._split_name(TEST, variant), plans, progress)
                measured |= {Case(plan, variant): values for plan, values in zip(plans, outcomes, strict=True)}
                scoring.release()
        return {case: measured[self._canonical(case)] for case in (Case(Plan(), self.plain), *cases)}

    def dense(self, measured: Measured) -> dict[str, float]:
        """The dense model's metrics on the held-out samples."""
        return dataset_metrics(measured[Case(Plan(), self.plain)])

    def loss(self, measured: Measured, case: Case) -> float:
        """Minus the mean change of a case against the dense model."""
        return plan_loss(dataset_metrics(measured[case]), self.dense(measured), relative=self._relative)

    def series(
        self,
        name: str,
        x: Sequence[float],
        cases: Sequence[Sequence[Case]],
        measured: Measured,
        orders: Sequence[Sequence[int]] = (),
    ) -> Series:
        """A line of a plot; each x has one case, or the mean over several."""
        table = self.table(measured, cases)
        mean = self.interval(table, mean_over_datasets)
        dense, points = self.dense(measured), []
        for place, (where, group) in enumerate(zip(x, cases, strict=True)):
            metrics = {dataset: float(values[place].mean()) for dataset, values in table.items()}
            only = group[0] if len(group) == 1 else None
            points.append(
                Point(
                    x=float(where),
                    case=only,
                    metrics=metrics,
                    loss=plan_loss(metrics, dense, relative=self._relative),
                    mean=float(mean.value[place]),
                    low=float(mean.low[place]),
                    high=float(mean.high[place]),
                    flops=None if only is None or only.variant.tokens == "text" else self.flops(only),
                )
            )
        return Series(name, tuple(points), tuple(map(tuple, orders)))

    def table(self, measured: Measured, cases: Sequence[Sequence[Case]]) -> dict[str, np.ndarray]:
        """Per dataset the outcomes [points, samples], each point the mean over its cases."""
        return {
            name: np.array([np.mean([measured[case][name] for case in group], axis=0) for group in cases])
            for name in self._splits[TEST].datasets
        }

    def interval(self, table: Mapping[str, np.ndarray], statistic: Statistic) -> Interval:
        """The 95 % bootstrap interval of a statistic."""
        draws = self.config.report.bootstrap_samples
        return bootstrap_interval(table, statistic, images=self._splits[TEST].images, samples=draws, seed=self.config.seed)

    def losses(self, metrics: np.ndarray, dense: np.ndarray) -> np.ndarray:
        """Losses [draws, points] of metrics [draws, points, datasets] against the dense ones [draws, 1, datasets]."""
        lost = dense - metrics
        return (lost / dense if self._relative else lost).mean(axis=-1)

    def flops(self, case: Case) -> Flops:
        """The FLOPs that a case saves."""
        decoder, split, length = self._decoder, self._splits[TEST], self.num_layers
        sizes = decoder.layer_sizes
        plan, reduction = case.plan, case.variant.reduction
        attention, ffn = plan.settings(length)[-1]
        shares = []
        for text, visual in zip(split.num_text.tolist(), split.num_visual.tolist(), strict=True):
            reaching = visual_in_layer(case.variant.pruning, visual, length)

            def whole(plan: Plan, reaching: Sequence[int], probes: bool, text: int = text) -> int:
                return prefill_cost(sizes, text, reaching, plan, reduction, with_probes=probes)

            def last(visual: int, attention: Level, ffn: Level, text: int = text) -> int:
                return layer_cost(sizes, text, visual, reduction, attention=attention, ffn=ffn, with_probes=False)

            dense = whole(Plan(), [visual] * length, False)
            left = (
                whole(plan, reaching, False),
                whole(plan, reaching, True),
                dense - last(visual, FULL, FULL) + last(reaching[-1], attention, ffn),
            )
            shares.append([1 - cost / dense for cost in left])
        return Flops(*(sum(column) / len(shares) for column in zip(*shares, strict=True)))

    @property
    def _relative(self) -> bool:
        return self.config.search.change == "relative"

    def _canonical(self, case: Case) -> Case:
        """The case that stands for all cases of the same computation: a plan that reduces nothing is the dense model."""
        dense = case.plan == Plan() and case.variant.pruning is None
        return replace(case, variant=self.plain) if dense else case

    def _split_name(self, split: str, variant: Variant) -> str:
        """The journal's name for a split under a variant."""
        return split if variant == self.plain else f"{split} {variant.key()}"

    def _search_evaluator(self, measure: Measure) -> tuple[str, Evaluator]:
        """The validation split, by the journal's name for it under a measure, and its evaluator."""
        evaluator, scoring = self._evaluator(VALIDATION, self.plain)
        if measure != "kl":
            return VALIDATION, evaluator
        if self._fidelity is None:
            self._fidelity = Fidelity(scoring.programs, "kl")
        split = f"{VALIDATION} {measure}"
        return split, replace(evaluator, scoring=self._fidelity, splits={split: self._splits[VALIDATION]})

    def _evaluator(self, split: str, variant: Variant) -> tuple[Evaluator, Scoring]:
        if variant not in self._scorings:
            self._scorings[variant] = self._scoring_of(variant)
        scoring = self._scorings[variant]
        evaluator = Evaluator(
            scoring,
            {self._split_name(split, variant): self._splits[split]},
            self._journal,
            state_bytes=self.config.compute.state_memory_gb * 1e9,
        )
        return evaluator, scoring
