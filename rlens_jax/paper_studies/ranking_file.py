"""The orders of layers of a finished ranking run."""

import json
from pathlib import Path

from rlens_jax.errors import UserError
from rlens_jax.plan import OPERATORS, Operator
from rlens_jax.reporting.ranking_json import SCHEMA


def read_orders(path: Path, model_hash: str, num_layers: int) -> dict[Operator, tuple[int, ...]]:
    """Each operator's order in a ranking.json.

    Args:
        path: of the file.
        model_hash: of the model that is studied.
        num_layers: its layers.

    Raises:
        UserError: the file cannot be read, is no ranking, or is of another model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the ranking {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{path} is no {SCHEMA}; name the ranking.json of a run of rlens_jax.rank")
    model, rankings = found.get("model"), found.get("rankings")
    if not isinstance(model, dict) or model.get("hash") != model_hash:
        raise UserError(f"{path} ranks the layers of another model; name one of this model")
    if not isinstance(rankings, dict):
        raise UserError(f"{path} has no rankings; name the ranking.json of a finished run")
    orders: dict[Operator, tuple[int, ...]] = {}
    for operator in OPERATORS:
        order = rankings.get(operator)
        if order is None:
            continue  # was not ranked there, and is searched
        if not isinstance(order, list) or set(order) != set(range(num_layers)) or len(order) != num_layers:
            raise UserError(f"{path}: rankings.{operator} must name each of the {num_layers} layers once")
        orders[operator] = tuple(order)
    return orders
