"""HallusionBench's score (Guan et al., arXiv:2310.14566; `vlmeval/dataset/utils/yorn.py`, `Hallusion_rating`)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlens_jax.errors import UserError
from rlens_jax.metrics.score import Aggregate, Ratio, Row, mean_ratio


@dataclass(frozen=True)
class _Ids:
    """Where a row belongs: `group` is its set of figures and questions, the other two are keys within it."""

    group: str
    figure: tuple[str, str]
    question: tuple[str, str]


def hallusion_bench(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """The mean of aAcc, fAcc and qAcc, in percent: OpenCompass' headline.

    aAcc is the share of right answers, fAcc that of figures with all their questions right, qAcc that of
    questions right on all their figures. Parts 4, 5 and 6 of an index, split at "_", are the ids of set, figure
    and question; they are unique within an l2-category only. A group is a set: the smallest that holds
    figures and questions whole.

    The breakdown has the three, over all rows and under "category/..." and "l2_category/...".

    Raises:
      UserError: an index without the ids, or a row without l2-category.
    """
    ids = [_ids(row) for row in rows]
    ratios = _accuracies(ids, per_sample)
    breakdown = {name: ratio.value for name, ratio in ratios.items()}
    for field in ("category", "l2_category"):
        labels = [getattr(row, field) for row in rows]
        for label in sorted({label for label in labels if label is not None}):
            chosen = [number for number, other in enumerate(labels) if other == label]
            parts = _accuracies([ids[number] for number in chosen], [per_sample[number] for number in chosen])
            breakdown |= {f"{field}/{label}/{name}": ratio.value for name, ratio in parts.items()}
    thirds = tuple(Ratio(ratio.scale / 3, ratio.numerators, ratio.denominators) for ratio in ratios.values())
    return Aggregate(thirds, breakdown, tuple(place.group for place in ids), ("",) * len(rows))


def _ids(row: Row) -> _Ids:
    parts = row.index.split("_")
    if len(parts) < 6:
        raise UserError(
            f"HallusionBench: row {row.index}: the index must have six parts joined by '_', "
            "the last three of them the ids of set, figure and question"
        )
    if row.l2_category is None:
        raise UserError(f"HallusionBench: row {row.index}: no l2-category, without which its ids are not unique")
    group = f"{row.l2_category}_{parts[3]}"
    return _Ids(group, (group, parts[4]), (group, parts[5]))


def _accuracies(ids: Sequence[_Ids], hits: Sequence[float]) -> dict[str, Ratio]:
    ratios = {"aAcc": mean_ratio(100, (place.group for place in ids), hits)}
    for name, keys in (
        ("fAcc", [place.figure for place in ids]),
        ("qAcc", [place.question for place in ids]),
    ):
        all_right: dict[tuple[str, str], float] = defaultdict(lambda: 1.0)
        for key, hit in zip(keys, hits, strict=True):
            all_right[key] = min(all_right[key], hit)
        ratios[name] = mean_ratio(100, (group for group, _ in all_right), all_right.values())
    return ratios
