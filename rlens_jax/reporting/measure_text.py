"""What a run scores plans by, in words, and its numbers in their unit: the configuration as in ranking.json."""

from collections.abc import Mapping
from typing import Any

from rlens_jax.config import DIVERGENCES, OWN_ANSWERS, DataConfig

NAMES = {
    "teacher_forced": "exact match, teacher forced",
    "generation": "exact match of the generated text",
    "kl": "fidelity, not correctness: divergence of the answer's token distributions from the dense model's, in nats",
    "agreement": "fidelity, not correctness: share of the answer's tokens that stay the dense model's best ones",
    "first_token_kl": "fidelity, not correctness: divergence of the first token's distribution, plan to dense model, in nats",
    "exact_agreement": "fidelity, not correctness: whether all of the answer's tokens stay the dense model's",
}
OWN = "on the dense model's own answers"
CAVEATS = (
    "Fidelity counts the dense model's mistakes as right. On short answers, the divergence is mostly about the first token. "
    "An answer in other words counts as a loss."
)


def measure_of(search: Mapping[str, Any]) -> str:
    """The measure of a search, from its fields; a file of an earlier version has fewer of them."""
    return "kl" if search.get("one_shot_by") == "kl" else str(search["objective"])


def held_out_of(config: Mapping[str, Any]) -> str:
    """What the held-out curves show."""
    objective = str(config["search"]["objective"])
    if objective not in OWN_ANSWERS:
        return objective
    return "teacher_forced" if DataConfig(config["data"]["source"]).has_answers else "agreement"


def objective_text(config: Mapping[str, Any]) -> str:
    """What the search scores plans by, and what the held-out curves show, if that is something else."""
    search, held_out = config["search"], held_out_of(config)
    measure = measure_of(search)
    text = NAMES.get(measure, measure) + (f", {OWN}" if search["objective"] in OWN_ANSWERS else "")
    if measure not in OWN_ANSWERS:
        return f"{text}; {search['change']} change, drops weigh {search['penalty']:g} times"
    return f"{text}; held-out curves: {NAMES.get(held_out, held_out)}. {CAVEATS}"


def metric_text(measure: str, value: float) -> str:
    """A metric: a share, or a divergence, which metrics have with its sign turned."""
    return loss_text(measure, -value if measure in DIVERGENCES else value, 1)


def loss_text(measure: str, loss: float, digits: int = 2) -> str:
    """A loss, in percent or in nats."""
    return f"{loss + 0:.3g} nats" if measure in DIVERGENCES else f"{round(100 * loss, digits) + 0:.{digits}f} %"
