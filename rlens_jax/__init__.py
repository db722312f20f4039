"""RedundancyLens (arXiv 2501.19036) for JAX and TPU: which layers of a multimodal LLM waste visual computation.

Generate under a plan:

    model = rlens_jax.load("embedded")
    plan = rlens_jax.read_plan("plan.json")
    text = model.generate(images=["page.png"], prompt="digit at row 1 column 2 ?", plan=plan)

Rank layers and score a plan, as the commands do:

    results = rlens_jax.rank(rlens_jax.RunConfig(output="runs/rank"))
    plan = rlens_jax.read_plan("runs/rank/ranking.json", first={"attention": 6, "ffn": 6})
    scores = rlens_jax.evaluate(rlens_jax.EvaluationConfig("embedded", plan, ("pages",), Path("runs/evaluate")))
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlens_jax.config import RunConfig
    from rlens_jax.engine.deployed_model import load
    from rlens_jax.evaluation.evaluation import EvaluationConfig
    from rlens_jax.evaluation.evaluation_run import evaluate
    from rlens_jax.plan_file import read_plan
    from rlens_jax.ranking.ranking_run import rank

__all__ = ["EvaluationConfig", "RunConfig", "evaluate", "load", "rank", "read_plan"]
__version__ = "0.1.0"

# The commands are the modules of one folder; with it on the path, `python -m rlens_jax.rank` runs commands/rank.py.
__path__.append(str(Path(__file__).parent / "commands"))


# Imported on first use: most of them import JAX. Commands set up its logs first, and report bad input without it.
_HOMES = {
    "EvaluationConfig": "rlens_jax.evaluation.evaluation",
    "RunConfig": "rlens_jax.config",
    "evaluate": "rlens_jax.evaluation.evaluation_run",
    "load": "rlens_jax.engine.deployed_model",
    "rank": "rlens_jax.ranking.ranking_run",
    "read_plan": "rlens_jax.plan_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
