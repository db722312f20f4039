"""`ranking.json`, the result of a ranking run: how it is written, and how every command reads it.

The file follows `ranking.schema.json` in this folder. It contains nothing that differs between two runs of one
configuration, so a run that was killed and resumed writes the same bytes as an uninterrupted one.

While a run goes on, its file is marked as provisional: it has the rankings found so far, each of which is final, and no held-out
curves. So a plan can be taken from it. Without a report, the final file has no curves either.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlens_jax.errors import UserError
from rlens_jax.files import check_schema, field_error, quoted, read_json, shortened
from rlens_jax.plans import OPERATORS, Operator, Plan, Reduction
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.results import Curve, OperatorResult, RandomCurves, Results, Saving, Searched
from rlens_jax.search.search import Ranking, Round

RANKING = "ranking.json"
LARGEST_RANKING = 8 * 2**20
"""Bytes; that of a search over 80 layers, both operators and ten datasets has a third."""
SCHEMA = "rlens-ranking/1"
_SCHEMA_FILE = Path(__file__).with_name("ranking.schema.json")


@dataclass(frozen=True)
class RankingFile:
    """A ranking.json that follows its schema and does not contradict itself."""

    fields: Mapping[str, Any]
    """The whole file as JSON values."""

    @property
    def model_hash(self) -> str:
        """Hash of the weights of the ranked model."""
        return self.fields["model"]["hash"]

    @property
    def num_layers(self) -> int:
        """L of the ranked model."""
        return self.fields["model"]["num_layers"]

    @property
    def provisional(self) -> bool:
        """Whether the run goes on, or was stopped: rankings or curves are missing."""
        return self.fields.get("provisional", False)

    @property
    def orders(self) -> dict[Operator, tuple[int, ...]]:
        """All layers per ranked operator, the first to reduce first."""
        rankings = self.fields["rankings"]
        return {operator: tuple(rankings[operator]) for operator in OPERATORS if operator in rankings}

    @property
    def base(self) -> Plan:
        """The layers that were reduced throughout the searches."""
        bases = [search["base"] for search in self.fields["search"].values()]
        attention, ffn = ({layer for base in bases for layer in base[operator]} for operator in OPERATORS)
        return Plan(tuple(attention), tuple(ffn))

    @property
    def reduction(self) -> Reduction:
        """The settings of both operators in the ranking run."""
        return Reduction(**self.fields["configuration"]["reduction"])


def read_ranking(path: Path) -> RankingFile:
    """Read a ranking.json. UserError when it cannot be read or `check_ranking` refuses it."""
    return check_ranking(read_json(path, LARGEST_RANKING), path)


def check_ranking(value: Any, path: Path) -> RankingFile:
    """Check the JSON value of a ranking.json; errors name `path` and the field.

    Raises:
        UserError: the value has another schema, does not follow it, or contradicts itself.
    """
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        found = quoted(schema)
        raise UserError(f"{path} is not the ranking.json of a run of rlens_jax.rank: its schema must be {SCHEMA!r}, not {found}")
    check_schema(value, _SCHEMA_FILE, path)
    _check_names(path, value)
    num_layers = value["model"]["num_layers"]
    for operator, order in value["rankings"].items():
        _check_order(path, f"rankings.{operator}", order, num_layers)
        _check_search(path, f"search.{operator}", value["search"][operator], value, operator)
        if "held_out" in value:
            _check_held_out(path, f"held_out.{operator}", value["held_out"][operator], num_layers)
    for name, saving in value.get("savings", {}).items():
        for operator, layers in saving["plan"].items():
            check_layers(path, f"savings.{name}.plan.{operator}", layers, num_layers)
    return RankingFile(value)


def check_layers(path: Path, field: str, layers: Iterable[int], num_layers: int) -> None:
    """Raise UserError, naming file and field, unless the model has all `layers`."""
    for layer in layers:
        if layer >= num_layers:
            raise field_error(path, field, f"there is no layer {layer}; the model has {num_layers}")


def _check_names(path: Path, fields: Mapping[str, Any]) -> None:
    """All parts must be about the same datasets, operators and plans."""
    datasets, rankings = fields["dense"]["validation"], fields["rankings"]
    for split in ("validation", "test"):
        _check_same(path, f"data.samples.{split}", fields["data"]["samples"][split], datasets, "datasets")
    _check_same(path, "search", fields["search"], rankings, "operators")
    if ("held_out" in fields) != ("test" in fields["dense"]):
        raise field_error(path, "dense.test", "must be there if and only if the field held_out is")
    if "held_out" in fields:
        _check_same(path, "dense.test", fields["dense"]["test"], datasets, "datasets")
        _check_same(path, "held_out", fields["held_out"], rankings, "operators")
        plans = [*rankings, "both"] if len(rankings) == 2 else [*rankings]
        _check_same(path, "savings", fields["savings"], plans, "plans")


def _check_search(path: Path, where: str, search: Mapping[str, Any], fields: Mapping[str, Any], operator: str) -> None:
    num_layers = fields["model"]["num_layers"]
    check_layers(path, f"{where}.base", search["base"][operator], num_layers)
    for number, round_ in enumerate(search["rounds"]):
        field = f"{where}.rounds[{number}]"
        layers = [candidate["layer"] for candidate in round_["candidates"]]
        check_layers(path, f"{field}.candidates", layers, num_layers)
        if round_["chosen"] not in layers:
            raise field_error(path, f"{field}.chosen", f"layer {round_['chosen']} was no candidate")
        for place, candidate in enumerate(round_["candidates"]):
            if candidate.get("bound") and candidate["score"] >= round_["score"]:
                raise field_error(path, f"{field}.candidates[{place}].score", "a bound must be below the score of the round")
            metrics = f"{field}.candidates[{place}].metrics"
            _check_same(path, metrics, candidate["metrics"], fields["dense"]["validation"], "datasets")


def _check_held_out(path: Path, where: str, held_out: Mapping[str, Any], num_layers: int) -> None:
    for strategy, curve in held_out["curves"].items():
        field = f"{where}.curves.{strategy}"
        _check_order(path, f"{field}.order", curve["order"], num_layers)
        if [point["num_reduced"] for point in curve["points"]] != list(range(num_layers + 1)):
            raise field_error(path, f"{field}.points", f"must have 0, 1, ... {num_layers} reduced layers")
    drawn = {"random"} if held_out["random"]["rankings"] else set()
    _check_same(path, f"{where}.areas", held_out["areas"], {*held_out["curves"], *drawn}, "strategies")
    _check_same(path, f"{where}.margins", held_out["margins"], {*held_out["curves"], *drawn} - {"searched"}, "strategies")
    points = held_out["random"]["num_reduced"]
    for number, random in enumerate(held_out["random"]["rankings"]):
        if len(random["means"]) != len(points):
            field = f"{where}.random.rankings[{number}].means"
            raise field_error(path, field, f"must be {len(points)} numbers, not {len(random['means'])}")
    if any(point > num_layers for point in points):
        raise field_error(path, f"{where}.random.num_reduced", f"the model has {num_layers} layers")


def _check_order(path: Path, field: str, order: Sequence[int], num_layers: int) -> None:
    if sorted(order) != list(range(num_layers)):
        raise field_error(path, field, f"must name each of the layers 0 to {num_layers - 1} once")


def _check_same(path: Path, field: str, names: Iterable[str], expected: Iterable[str], what: str) -> None:
    if set(names) != set(expected):
        found = shortened(", ".join(names))
        raise field_error(path, field, f"must have the {what} {', '.join(expected)}, not {found}")


def ranking_fields(run: Searched) -> dict[str, Any]:
    """The fields of ranking.json, as JSON values; curves and savings only of a run that has them."""
    dense, held_out = {"validation": dict(run.dense_validation)}, {}
    if isinstance(run, Results):
        dense["test"] = dict(run.dense_test)
        held_out["held_out"] = {str(name): _held_out(result) for name, result in run.operators.items()}
        held_out["savings"] = {
            str(name): _saving(saving) | _if_known("largest_divergence", run.divergences.get(name))
            for name, saving in run.savings.items()
        }
    return {
        "schema": SCHEMA,
        **({"provisional": True} if run.provisional else {}),
        "rankings": {name: list(ranking.order) for name, ranking in run.rankings.items()},
        "model": {"path": run.config.model, "hash": run.model_hash, "num_layers": run.num_layers},
        "data": {
            "hash": run.data_hash,
            "orientation": "as stored" if run.config.data.is_mixture else "applied",
            "samples": {"validation": dict(run.validation_samples), "test": dict(run.test_samples)},
        },
        "dense": dense,
        "search": {name: _search(ranking) for name, ranking in run.rankings.items()},
        **held_out,
        "buckets": dataclasses.asdict(run.buckets),
        "configuration": run.config.portable(),
        "versions": dict(run.versions),
    }


def _plan(plan: Plan) -> dict[str, list[int]]:
    return {"attention": list(plan.attention), "ffn": list(plan.ffn)}


def _evaluation(score: PlanScore) -> dict[str, Any]:
    evaluation = {"score": score.score, "loss": score.loss, "metrics": dict(score.metrics)}
    return {**evaluation, "bound": True} if score.bound else evaluation


def _search(ranking: Ranking) -> dict[str, Any]:
    return {
        "base": _plan(ranking.base),
        "method": ranking.method,
        **({"noise": ranking.noise} if ranking.noise else {}),
        "position_layers": len(ranking.prefix_scores),
        "scores": [point.score for point in ranking.curve()],
        "dense_and_position": [_evaluation(score) for score in (ranking.base_score, *ranking.prefix_scores)],
        "rounds": [_round(round_) for round_ in ranking.rounds],
    }


def _round(round_: Round) -> dict[str, Any]:
    return {
        "base": _plan(round_.base),
        "candidates": [{"layer": layer, **_evaluation(score)} for layer, score in zip(round_.layers, round_.scores, strict=True)],
        "chosen": round_.chosen,
        "score": round_.chosen_score.score,
        "ties": list(round_.ties),
    }


def _held_out(result: OperatorResult) -> dict[str, Any]:
    return {
        "curves": {name: _curve(curve) for name, curve in result.curves.items()},
        "random": _random(result.random),
        "area_points": list(result.area_points),
        "areas": {name: area.fields() for name, area in result.areas.items()},
        "margins": {name: margin.fields() for name, margin in result.margins.items()},
    }


def _curve(curve: Curve) -> dict[str, Any]:
    points = zip(curve.metrics, curve.losses, curve.mean.value, curve.mean.low, curve.mean.high, strict=True)
    return {
        "order": list(curve.order),
        "points": [
            {
                "num_reduced": number,
                "mean": float(mean),
                "low": float(low),
                "high": float(high),
                "loss": loss,
                "metrics": dict(metrics),
            }
            for number, (metrics, loss, mean, low, high) in enumerate(points)
        ],
    }


def _random(random: RandomCurves) -> dict[str, Any]:
    return {
        "num_reduced": list(random.num_reduced),
        "rankings": [
            {"order": list(order), "means": list(means)} for order, means in zip(random.orders, random.means, strict=True)
        ],
    }


def _if_known(field: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {field: value}


def _saving(saving: Saving) -> dict[str, Any]:
    return {
        "plan": _plan(saving.plan),
        "loss": saving.loss,
        "flops_saved": saving.flops,
        "flops_saved_with_probes": saving.flops_with_probes,
    }
