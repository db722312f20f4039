"""Compare two layer rankings. A ranking is a list of layers, most redundant first."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlens_jax.errors import UserError
from rlens_jax.files import parse_json, quoted, read_text, shortened
from rlens_jax.mirrors import fetched, place
from rlens_jax.plans import MOST_LAYERS
from rlens_jax.search.ranking_file import check_ranking


@dataclass(frozen=True)
class Source:
    """The rankings of one argument: one per operator from a ranking.json, else a single one with the name ""."""

    name: str
    rankings: Mapping[str, tuple[int, ...]]
    num_layers: int | None


@dataclass(frozen=True)
class RankingComparison:
    """Comparison of the rankings `a` and `b`."""

    name: str
    """The operator, or "" if neither argument names it."""
    a: tuple[int, ...]
    b: tuple[int, ...]
    kendall_tau: float
    """Over the layers in both: 1 for the same order, 0 for unrelated orders, -1 for reversed orders."""
    overlaps: tuple[float, ...]
    """For k = 1, 2, ...: share of the first k layers of `a` that are among the first k of `b`."""
    places_of_a_in_b: tuple[int | None, ...]
    """For each layer of `a` in order: its place in `b`, from 1; None if `b` does not have it."""
    places_of_b_in_a: tuple[int | None, ...]


def compare_rankings(a: str, b: str, num_layers: int | None) -> list[RankingComparison]:
    """Compare the rankings of two arguments, per operator if both have operators.

    Args:
        a, b: each one of our ranking.json files, a list such as "27,26,25", or a file with a list (separated by commas, spaces
            or lines, or as JSON).
        num_layers: number of layers of the model; None takes it from a ranking.json, or else the length of the longer list.

    Raises:
        UserError: an argument is not readable, it names a layer twice or one out of range, or there is nothing to compare.
    """
    sources = [_read(argument) for argument in (a, b)]
    known = {source.num_layers for source in sources if source.num_layers is not None}
    if num_layers is not None:
        known.add(num_layers)
    if len(known) > 1:
        raise UserError(f"the rankings are of models with {' and '.join(map(str, sorted(known)))} layers")
    longest = max(len(order) for source in sources for order in source.rankings.values())
    layers = known.pop() if known else longest
    for source in sources:
        for name, order in source.rankings.items():
            _check(order, layers, f"{source.name}: {name}" if name else source.name)
    first, second = (source.rankings for source in sources)
    # A list has the name "" and is compared with the ranking of every operator.
    pairs = [(one or other, first[one], second[other]) for one in first for other in second if one == other or "" in (one, other)]
    if not pairs:
        raise UserError(f"{a} ranks {', '.join(first)}, {b} ranks {', '.join(second)}: nothing to compare")
    return [_compare(*pair) for pair in pairs]


def _read(argument: str) -> Source:
    path = fetched(place(argument))
    if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises OSError for a long list)
        if not re.fullmatch(r"[\s\d,;+-]*", argument):
            raise UserError(f"{shortened(argument)}: neither a file nor a list of layers such as 27,26,25")
        return Source("the list", {"": _parse(argument, "the list")}, None)
    text = read_text(path)
    if not text.lstrip().startswith(("{", "[")):
        return Source(argument, {"": _parse(text, argument)}, None)
    value = parse_json(text, path)
    if isinstance(value, list):
        return Source(argument, {"": _whole_numbers(value, argument)}, None)
    ranking = check_ranking(value, path)
    return Source(argument, {str(operator): order for operator, order in ranking.orders.items()}, ranking.num_layers)


def _parse(text: str, where: str) -> tuple[int, ...]:
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    for word in words:
        if not re.fullmatch(r"[+-]?\d{1,6}", word, re.ASCII):
            raise UserError(f"{where}: {quoted(word)} is no layer number")
    return _whole_numbers([int(word) for word in words], where)


def _whole_numbers(values: Sequence[Any], where: str) -> tuple[int, ...]:
    if not values:
        raise UserError(f"{where}: is an empty list of layers")
    for value in values:
        if type(value) is not int:
            raise UserError(f"{where}: {quoted(value)} is no layer number")
    if len(values) > MOST_LAYERS:
        raise UserError(f"{where}: lists {len(values)} layers; no model has more than {MOST_LAYERS}")
    return tuple(values)


def _check(order: Sequence[int], num_layers: int, where: str) -> None:
    seen = set()
    for layer in order:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"{where}: layer {layer} is out of range, the model has {num_layers} layers (0-{num_layers - 1}); "
                "for lists that are not complete, say --layers"
            )
        if layer in seen:
            raise UserError(f"{where}: names layer {layer} twice")
        seen.add(layer)


def kendall_tau(a: Sequence[int], b: Sequence[int]) -> float:
    """The agreement of two orders of the same layers, at least two: 1 for equal ones, -1 for the reverse."""
    place = {layer: number for number, layer in enumerate(b)}
    pairs = list(combinations(a, 2))
    agreeing = sum(place[x] < place[y] for x, y in pairs)
    return (2 * agreeing - len(pairs)) / len(pairs)


def _compare(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> RankingComparison:
    place_a, place_b = ({layer: place for place, layer in enumerate(order, 1)} for order in (a, b))
    common = [layer for layer in a if layer in place_b]
    if len(common) < 2:
        raise UserError("the two rankings have fewer than two layers in common: nothing to compare")
    return RankingComparison(
        name,
        a,
        b,
        kendall_tau(common, [layer for layer in b if layer in place_a]),
        tuple(len(set(a[:k]) & set(b[:k])) / k for k in range(1, min(len(a), len(b)) + 1)),
        tuple(place_b.get(layer) for layer in a),
        tuple(place_a.get(layer) for layer in b),
    )
