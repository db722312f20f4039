"""Rows of MME and HallusionBench, whose scores are not means over rows, from the answers that are right."""

from collections.abc import Mapping, Sequence

from rlens_jax.metrics.choice_metrics import PERCEPTION, REASONING
from rlens_jax.metrics.score import Row

Pairs = Sequence[Sequence[int]]
"""Per image: 1 for each question with a right answer, else 0."""


def mme_rows(pairs_of: Mapping[str, Pairs], others: Pairs = ((1, 1),)) -> list[Row]:
    """Questions of all 14 categories: the first of an image has the answer Yes, the next No, and so on."""
    return [
        Row(
            f"{category}.{image}.{question}",
            "yes" if hit == (question % 2 == 0) else "no",
            ("Yes" if question % 2 == 0 else "No",),
            category=category,
            image=f"images/{image}.png",
        )
        for category in PERCEPTION + REASONING
        for image, pair in enumerate(pairs_of.get(category, others))
        for question, hit in enumerate(pair)
    ]


Hits = Mapping[tuple[str, str, str], int]
"""1 for a right answer, else 0, by the ids of set, figure and question."""


def hallusion_rows(hits: Hits, *, category: str = "VD", l2_category: str = "chart") -> list[Row]:
    """Questions of one l2-category."""
    return [
        Row(
            f"hb_{category}_{l2_category}_{set_id}_{figure}_{question}",
            "Yes." if hit else "not sure",
            ("Yes",),
            category=category,
            l2_category=l2_category,
        )
        for (set_id, figure, question), hit in hits.items()
    ]
