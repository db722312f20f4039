"""`<study>.json`: what a study found, for programs; see `study.schema.json` beside this file.

It holds nothing that differs from one run of a configuration to the next.
"""

import dataclasses
from typing import Any

from rlens_jax.files import json_text
from rlens_jax.paper_studies.study import Facts, Panel, Point, Series, Study
from rlens_jax.pruning import Pruning

SCHEMA = "rlens-study/1"


def study_json(study: Study, facts: Facts) -> str:
    """The text of a study's file."""
    return json_text(
        {
            "schema": SCHEMA,
            "study": study.name,
            "question": study.question,
            "x": {"label": study.x_label, "scale": study.x_scale},
            "panels": [_panel(panel) for panel in study.panels],
            "findings": [dataclasses.asdict(finding) for finding in study.findings],
            "model": {
                "path": facts.model,
                "hash": facts.model_hash,
                "num_layers": facts.num_layers,
            },
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
        "series": [_series(series) for series in panel.series],
    }


def _series(series: Series) -> dict[str, Any]:
    return {
        "name": series.name,
        "orders": [list(order) for order in series.orders],
        "points": [_point(point) for point in series.points],
    }


def _pruning(pruning: Pruning) -> dict[str, Any]:
    return {"method": type(pruning).__name__.lower(), **dataclasses.asdict(pruning)}


def _point(point: Point) -> dict[str, Any]:
    case = None
    if point.case is not None:
        plan, variant = point.case.plan, point.case.variant
        case = {
            "attention": list(plan.attention),
            "ffn": list(plan.ffn),
            "reduction": dataclasses.asdict(variant.reduction),
            "tokens": variant.tokens,
            "pruning": None if variant.pruning is None else _pruning(variant.pruning),
        }
    return {
        "x": point.x,
        "mean": point.mean,
        "low": point.low,
        "high": point.high,
        "loss": point.loss,
        "metrics": dict(point.metrics),
        "flops": None if point.flops is None else dataclasses.asdict(point.flops),
        "case": case,
    }
