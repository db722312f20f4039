"""RedundancyLens (arXiv 2501.19036) for JAX and TPU: which layers of a multimodal LLM waste visual computation.

model = rlens_jax.load("embedded")
plan = rlens_jax.read_plan("plan.json")
text = model.generate(images=["page.png"], prompt="digit at row 1 column 2 ?", plan=plan)
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlens_jax.engine.deployed_model import load
    from rlens_jax.plan_file import read_plan

__all__ = ["load", "read_plan"]
__version__ = "0.1.0"

# The commands are the modules of one folder; with it on the path, `python -m rlens_jax.rank` runs commands/rank.py.
__path__.append(str(Path(__file__).parent / "commands"))


# Imported on first use: `load` brings JAX, whose logs the commands set up first, and without which they report bad input.
_HOMES = {"load": "rlens_jax.engine.deployed_model", "read_plan": "rlens_jax.plan_file"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
