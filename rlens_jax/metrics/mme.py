"""MME's score (Fu et al., arXiv:2306.13394; `vlmeval/dataset/utils/yorn.py`, `MME_rating`)."""

import math
from collections import defaultdict
from collections.abc import Sequence

from rlens_jax.errors import UserError, suggest
from rlens_jax.metrics.score import Aggregate, Row, mean_ratio

PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
_CATEGORIES = PERCEPTION + REASONING


def mme(rows: Sequence[Row], per_sample: Sequence[float]) -> Aggregate:
    """The sum over the 14 categories of acc (share of right answers) and acc+ (share of images with both right).

    Both in percent, so a category gives up to 200 and the whole 2800: the sum of perception (10 categories)
    and reasoning (4; MME's paper says cognition). A group is an image of a category, drawn within its
    category: the categories are the benchmark's, not a sample of anything.

    Of an image with more than two questions, VLMEvalKit's acc+ sees the first two.

    Raises:
      UserError: a row without image or with an unknown category, an image with one question only, a category
        without rows (the sum of the others would be on another scale).
    """
    outcomes: dict[str, dict[str, list[float]]] = {category: defaultdict(list) for category in _CATEGORIES}
    groups = []
    for row, outcome in zip(rows, per_sample, strict=True):
        if row.category not in outcomes:
            raise UserError(
                f"MME: row {row.index}: unknown category {row.category!r}"
                f"{suggest(row.category or '', _CATEGORIES)}; known: {', '.join(_CATEGORIES)}"
            )
        if not row.image:
            raise UserError(f"MME: row {row.index}: no image_path, which says what questions are a pair")
        groups.append(f"{row.category}/{row.image}")
        outcomes[row.category][groups[-1]].append(outcome)
    if missing := [category for category, images in outcomes.items() if not images]:
        raise UserError(f"MME: no rows of {', '.join(missing)}; the score is a sum over all 14 categories")
    for images in outcomes.values():
        for image, pair in images.items():
            if len(pair) < 2:
                raise UserError(f"MME: {image} has one question; keep the two questions of an image together")

    ratios = []
    breakdown: dict[str, float] = {}
    for category, images in outcomes.items():
        asked = [(image, outcome) for image, pair in images.items() for outcome in pair]
        accuracy = mean_ratio(100, *zip(*asked, strict=True))
        both = mean_ratio(100, images, (pair[0] * pair[1] for pair in images.values()))
        ratios += [accuracy, both]
        breakdown |= {
            f"category/{category}": accuracy.value + both.value,
            f"category/{category}/acc": accuracy.value,
            f"category/{category}/acc+": both.value,
        }
    for name, categories in (("perception", PERCEPTION), ("reasoning", REASONING)):
        breakdown[name] = math.fsum(breakdown[f"category/{category}"] for category in categories)
    strata = tuple(str(row.category) for row in rows)
    return Aggregate(tuple(ratios), breakdown, tuple(groups), strata)
