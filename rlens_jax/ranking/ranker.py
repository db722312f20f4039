"""Ranks layers on the validation samples, and compares the rankings on held-out samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlens_jax.config import RunConfig
from rlens_jax.console import Progress
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.fidelity import FIDELITY, noise_floor
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.forecast import Forecast
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.search.curves import FlopsSaved, chain_order, held_out_plans, operator_result, plan_saving
from rlens_jax.search.expected_work import CURVES, search_label
from rlens_jax.search.objective import dataset_metrics, relative_changes
from rlens_jax.search.results import OperatorResult, Saving
from rlens_jax.search.search import Ranking, num_evaluations, rank_layers

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class Comparison:
    """The rankings against other orders on the held-out samples."""

    operators: Mapping[Operator, OperatorResult]
    combined: Saving | None
    """The saving of both operators' plans together, None if only one was ranked."""

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan that the report recommends for each operator, and for "both" of them."""
        plans: dict[str, Plan] = {operator: result.saving.plan for operator, result in self.operators.items()}
        return plans if self.combined is None else plans | {"both": self.combined.plan}

    @property
    def recommended(self) -> Plan:
        """The plan for both operators, or for the first one if only one was ranked."""
        return self.combined.plan if self.combined else next(iter(self.plans.values()))


@dataclass(frozen=True)
class Ranker:
    """The searches and comparisons of a run."""

    evaluators: Mapping[str, Evaluator]
    """By the name of the split: the search may score plans by another measure than the held-out curves."""
    num_layers: int
    config: RunConfig
    forecast: Forecast

    def metrics(self, split: str, plan: Plan, progress: Progress | None = None) -> dict[str, float]:
        """Each dataset's metric under a plan."""
        (outcomes,) = self.evaluators[split].chain(split, [plan], progress)
        return dataset_metrics(outcomes)

    @property
    def dense(self) -> dict[str, float]:
        """The dense model's metrics on the validation samples."""
        return self.metrics(VALIDATION, Plan())

    def rank(self, operator: Operator, position_layers: int | None) -> Ranking:
        """Rank the layers of one operator; arguments as of `rank_layers`."""
        length = self.num_layers
        prior = length // 4 if position_layers is None else position_layers
        search = self.config.search.by(self.config.search.method, self.config.search.one_shot_by)
        evaluations = num_evaluations(length, prior, search.method) + 1  # the dense plan counts twice
        label = search_label(operator, position_layers)
        with Progress(label, evaluations, "candidates", self.forecast) as progress:
            evaluator = self.evaluators[VALIDATION]
            noise = noise_floor(evaluator, VALIDATION) if search.measure in FIDELITY else 0.0
            dense = self.metrics(VALIDATION, Plan(), progress)
            score_round = RoundScorer(evaluator, VALIDATION, dense, search, progress, noise)
            return rank_layers(length, position_layers, operator, score_round, search.base(), search.method, noise)

    def compare(
        self, rankings: Mapping[Operator, Ranking], complete: Mapping[Operator, Ranking], flops_saved: FlopsSaved
    ) -> Comparison:
        """Compare rankings with other orders, and with `complete`, rankings without position prior, on the held-out samples."""
        report, seed, relative = self.config.report, self.config.seed, self.config.search.change == "relative"
        held_out, plans, dense = self.evaluators[TEST], [Plan()], self.metrics(TEST, Plan())
        relative_changes(dense, dense, relative=relative)  # before all curves
        for operator, ranking in rankings.items():
            plans += held_out_plans(ranking, report.random_rankings, seed, complete.get(operator))
        plans = chain_order(plans, self.num_layers)
        both = len(rankings) == len(OPERATORS)
        results: dict[Operator, OperatorResult] = {}
        combined = None
        with Progress(CURVES, len(plans) + both, "plans", self.forecast) as progress:
            outcomes = dict(zip(plans, held_out.chain(TEST, plans, progress), strict=True))
            for operator, ranking in rankings.items():
                results[operator] = operator_result(
                    ranking,
                    outcomes,
                    dense,
                    flops_saved,
                    num_random=report.random_rankings,
                    seed=seed,
                    search_all=complete.get(operator),
                    bootstrap_samples=report.bootstrap_samples,
                    relative=relative,
                    images=held_out.splits[TEST].images,
                )
            if both:
                plan = Plan(results["attention"].saving.plan.attention, results["ffn"].saving.plan.ffn)
                metrics = self.metrics(TEST, plan, progress)
                combined = plan_saving(plan, metrics, dense, flops_saved, relative=relative)
        return Comparison(results, combined)
