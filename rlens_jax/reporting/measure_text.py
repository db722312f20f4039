"""What a search scores plans by, in words, and its numbers in their unit: the configuration as in ranking.json."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "teacher_forced": "exact match, teacher forced",
    "generation": "exact match of the generated text",
    "kl": "fidelity: divergence of the answer's token distributions from the dense model's, in nats",
}


def measure_of(search: Mapping[str, Any]) -> str:
    """The measure of a search, from its fields; a file of an earlier version has fewer of them."""
    return "kl" if search.get("one_shot_by") == "kl" else str(search["objective"])


def objective_text(search: Mapping[str, Any]) -> str:
    """What the search scores plans by, and what the held-out curves show, if that is something else."""
    measure, objective = measure_of(search), str(search["objective"])
    text = NAMES.get(measure, measure)
    if measure != "kl":
        return f"{text}; {search['change']} change, drops weigh {search['penalty']:g} times"
    return f"{text}; held-out curves: {NAMES.get(objective, objective)}"


def metric_text(measure: str, value: float) -> str:
    """A metric: a share, or a divergence, which metrics have with its sign turned."""
    return loss_text(measure, -value if measure == "kl" else value, 1)


def loss_text(measure: str, loss: float, digits: int = 2) -> str:
    """A loss, in percent or in nats."""
    return f"{loss + 0:.3g} nats" if measure == "kl" else f"{round(100 * loss, digits) + 0:.{digits}f} %"
