"""`ranking.json` and `timing.json`: what a run found, for programs.

`ranking.json` follows `ranking.schema.json` beside this file. It holds nothing that differs from one run of a
configuration to the next, so a run that was killed and resumed writes it byte for byte as one that was not.
`timing.json` holds all that does differ.
"""

import dataclasses
from typing import Any

from rlens_jax.config import portable
from rlens_jax.files import json_text
from rlens_jax.plan import Plan
from rlens_jax.search.bootstrap import Interval
from rlens_jax.search.objective import PlanScore
from rlens_jax.search.results import Curve, OperatorResult, RandomCurves, Results, Saving, Timing
from rlens_jax.search.search import Ranking, Round

SCHEMA = "rlens-ranking/1"
TIMING_SCHEMA = "rlens-timing/1"


def ranking_json(results: Results) -> str:
    """The text of ranking.json."""
    return json_text(
        {
            "schema": SCHEMA,
            "rankings": {name: list(result.ranking.order) for name, result in results.operators.items()},
            "model": {
                "path": results.config.model,
                "hash": results.model_hash,
                "num_layers": results.num_layers,
            },
            "data": {
                "hash": results.data_hash,
                "samples": {
                    "validation": dict(results.validation_samples),
                    "test": dict(results.test_samples),
                },
            },
            "dense": {"validation": dict(results.dense_validation), "test": dict(results.dense_test)},
            "search": {name: _search(result.ranking) for name, result in results.operators.items()},
            "held_out": {name: _held_out(result) for name, result in results.operators.items()},
            "savings": {name: _saving(saving) for name, saving in results.savings.items()},
            "configuration": portable(results.config),
            "versions": dict(results.versions),
        }
    )


def timing_json(timing: Timing) -> str:
    """The text of timing.json."""
    return json_text({"schema": TIMING_SCHEMA, **dataclasses.asdict(timing)})


def _plan(plan: Plan) -> dict[str, list[int]]:
    return {"attention": list(plan.attention), "ffn": list(plan.ffn)}


def _evaluation(score: PlanScore) -> dict[str, Any]:
    return {"score": score.score, "loss": score.loss, "metrics": dict(score.metrics)}


def _search(ranking: Ranking) -> dict[str, Any]:
    return {
        "base": _plan(ranking.base),
        "position_layers": len(ranking.prefix_scores),
        "scores": [point.score for point in ranking.curve()],
        "dense_and_position": [_evaluation(score) for score in (ranking.base_score, *ranking.prefix_scores)],
        "rounds": [_round(round_) for round_ in ranking.rounds],
    }


def _round(round_: Round) -> dict[str, Any]:
    return {
        "base": _plan(round_.base),
        "candidates": [
            {"layer": layer, **_evaluation(score)} for layer, score in zip(round_.layers, round_.scores, strict=True)
        ],
        "chosen": round_.chosen,
        "score": round_.chosen_score.score,
        "ties": list(round_.ties),
    }


def _held_out(result: OperatorResult) -> dict[str, Any]:
    return {
        "curves": {name: _curve(curve) for name, curve in result.curves.items()},
        "random": _random(result.random),
        "area_points": list(result.area_points),
        "areas": {name: _interval(area) for name, area in result.areas.items()},
        "margins": {name: _interval(margin) for name, margin in result.margins.items()},
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
            {"order": list(order), "means": list(means)}
            for order, means in zip(random.orders, random.means, strict=True)
        ],
    }


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": float(interval.value), "low": float(interval.low), "high": float(interval.high)}


def _saving(saving: Saving) -> dict[str, Any]:
    return {
        "plan": _plan(saving.plan),
        "loss": saving.loss,
        "flops_saved": saving.flops,
        "flops_saved_with_probes": saving.flops_with_probes,
    }
