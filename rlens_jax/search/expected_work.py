"""The work that a ranking run expects, phase by phase, in layers times samples, for the time left that it shows."""

from collections.abc import Mapping

from rlens_jax.config import RunConfig, SearchConfig
from rlens_jax.forecast import Forecast, Work
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.search.curves import random_points

CURVES = "held-out curves"


def search_label(operator: Operator, position_layers: int | None) -> str:
    """The name of a search among the phases of a run."""
    return f"ranking {operator}" if position_layers != 0 else f"ranking {operator}, L_p = 0"


def expected_work(config: RunConfig, num_layers: int, samples: Mapping[str, int]) -> Forecast:
    """The phases of a run with L layers and so many samples per split.

    A candidate costs the layers from the one that it reduces. Which layers remain in a round is not known: the first ones are
    assumed. Early stopping shortens the candidates of a round.
    """
    search, report, phases = config.search, config.report, {}
    searches = [search.position_layers, *([0] if report.full_search and report.extent == "full" else [])]
    for position_layers in searches:
        for operator in search.operators:
            phases[search_label(operator, position_layers)] = _search(search, num_layers, position_layers, samples["validation"])
    if report.extent == "full":
        orders = (1 + len(searches)) * len(search.operators)
        prefixes = [(num_layers + 1) / 2] * (num_layers - 1) * orders  # each starts from the states of its predecessor
        points = [num_layers / 2] * (len(random_points(num_layers)) * report.random_rankings * len(search.operators))
        others = [num_layers] * (1 + (len(search.operators) == len(OPERATORS)))
        phases[CURVES] = Work([layers * samples["test"] for layers in (*others, *prefixes, *points)])
    return Forecast(phases)


def _search(search: SearchConfig, num_layers: int, position_layers: int | None, samples: int) -> Work:
    """The dense plan, the base, which may be dense, the prefixes that are ranked by position, and the rounds."""
    by_position = num_layers // 4 if position_layers is None else position_layers
    first = [num_layers, num_layers if search.base() != Plan() else 0, *range(1, by_position + 1)]
    searched = num_layers - by_position
    rounds = range(searched, 0, -1) if search.method == "greedy" else [searched]
    candidates = [num_layers - layer for size in rounds for layer in reversed(range(size))]
    full, raced = ([samples * layers for layers in items] for items in (first, candidates))
    return Work(full, raced) if search.by(search.method).stopping == "exact" else Work(full + raced)
