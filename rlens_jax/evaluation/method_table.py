"""The table of a comparison: a row per method, all beside the dense model on the same questions.

A *cost* of a row is a share of the dense model's: of its measured prefill time and time to the first token, of its multiply-adds,
and of the bytes of its KV cache. A row's *score* is the mean over the datasets of its score divided by the dense model's. Its
interval is that of paired bootstrap draws, in which the dense model's own score also varies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.evaluation.measured import Measured
from rlens_jax.evaluation.methods import Method
from rlens_jax.flops import TowerAttention, prefill_cost, selection_cost, visual_in_layer
from rlens_jax.metrics.score import Score
from rlens_jax.models.decoder import DecoderConfig
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import SKIP, value_of
from rlens_jax.reporting.comparison_report import COST_NAMES
from rlens_jax.search.bootstrap import Draws, Images, percentiles
from rlens_jax.search.confirmation import CONFIDENCE
from rlens_jax.search.front import dominating


@dataclass(frozen=True)
class Answered:
    """A method on a dataset."""

    score: Score
    prompts: Counter[tuple[int, int]]
    """How many of its prompts have such numbers of text and visual tokens."""
    unended: int
    """Answers that were cut off."""


@dataclass(frozen=True)
class Table:
    """All that a comparison found.

    Attributes:
        methods: the dense model first.
        answered: per method, its answers by dataset.
        measured: per method, its times and memory.
        images: per dataset, as of `search.bootstrap.Draws`.
        decoder, tower: the model's, as far as costs depend on it.
        itemsize: bytes of a number in the KV cache.
        samples, seed: of the bootstrap.
    """

    methods: Sequence[Method]
    answered: Sequence[Mapping[str, Answered]]
    measured: Sequence[Measured]
    images: Mapping[str, Images]
    decoder: DecoderConfig
    tower: TowerAttention | None
    itemsize: int
    samples: int
    seed: int

    def rows(self) -> list[dict[str, Any]]:
        """The rows as JSON values, as `comparison.schema.json` describes them."""
        rows = [self._row(place) for place in range(len(self.methods))]
        bounds = self._lower_bounds()
        for name in COST_NAMES:
            shares = [row["costs"][name] for row in rows]
            for row, others in zip(rows, dominating(shares, bounds), strict=True):
                row["dominated_by"][name] = [self.methods[other].name for other in others]
        for place, row in enumerate(rows):
            row["beside_down_sampled"] = {name: self._beside_down_sampled(rows, place, name) for name in COST_NAMES}
        return rows

    def _beside_down_sampled(self, rows: Sequence[Mapping[str, Any]], place: int, cost: str) -> dict[str, Any] | None:
        """Of the down-sampled images that cost no more, those with the best score, and how far it is above the row's score.

        None if none costs as little, and for rows that have down-sampled images themselves.
        """
        most = rows[place]["costs"][cost]
        smaller = [
            other
            for other, method in enumerate(self.methods)
            if method.image_share is not None and rows[other]["costs"][cost] <= most
        ]
        if self.methods[place].image_share is not None or not smaller:
            return None
        best = max(smaller, key=lambda other: rows[other]["score"]["value"])
        above = percentiles(self._relative(best) - self._relative(place), self._drawn[best] - self._drawn[place])
        return {"name": self.methods[best].name, "score_above": above.fields()}

    @cached_property
    def _draws(self) -> dict[str, np.ndarray]:
        """By dataset, float64[methods, samples]: scores of the same draws, divided by the dense model's measured score."""
        dense = self.answered[0]
        images = [self.images[name] for name in dense]
        drawn = Draws([each.score for each in dense.values()], images, samples=self.samples, seed=self.seed)
        return {
            name: np.stack([drawn.scores(place, each[name].score) for each in self.answered]) / dense[name].score.value
            for place, name in enumerate(dense)
        }

    @cached_property
    def _drawn(self) -> np.ndarray:
        """float64[methods, samples]: the mean of the draws over the datasets."""
        return np.mean(list(self._draws.values()), axis=0)

    def _relative(self, place: int) -> float:
        dense = self.answered[0]
        return float(np.mean([each.score.value / dense[name].score.value for name, each in self.answered[place].items()]))

    def _lower_bounds(self) -> np.ndarray:
        """float64[methods, methods]: the one-sided bound of the score of the first minus that of the second."""
        values = np.array([self._relative(place) for place in range(len(self.methods))])
        above = self._drawn[:, None] - self._drawn[None]  # [methods, methods, samples]
        return percentiles(values[:, None] - values, np.moveaxis(above, 2, 0), 2 * CONFIDENCE - 1).low

    def _row(self, place: int) -> dict[str, Any]:
        method, measured = self.methods[place], self.measured[place]
        times, steps = measured.times, measured.times.decode_steps
        counted, dense = self._counted(place), self._counted(0)
        timed = {name: _time(times.plan, times.dense, name) for name in ("prefill", "first_token", "decode")}
        adds = counted["multiply_adds"]
        return {
            "name": method.name,
            "label": method.plan.label(),
            "settings": method.settings(),
            "datasets": {name: self._dataset(place, name) for name in self.answered[place]},
            "score": percentiles(self._relative(place), self._drawn[place]).fields(),
            "change": percentiles(self._relative(place) - 1, self._drawn[place] - self._drawn[0]).fields(),
            **counted,
            "peak_memory": {"bytes": measured.peak.bytes, "source": measured.peak.source},
            "times": timed,
            "tokens_per_second": times.prompts * steps / median(times.plan.decode),
            "costs": {
                **{name: timed[name]["share"] for name in ("prefill", "first_token")},
                "multiply_adds": sum(adds.values()) / sum(dense["multiply_adds"].values()),
                "kv_bytes": counted["kv_bytes"] / dense["kv_bytes"],
            },
            "dominated_by": {},
        }

    def _dataset(self, place: int, name: str) -> dict[str, Any]:
        """The score of a method on a dataset, and its difference to the dense model's, in the dataset's own unit."""
        own, dense = self.answered[place][name], self.answered[0][name].score
        drawn = self._draws[name] * dense.value
        return {
            **percentiles(own.score.value, drawn[place]).fields(),
            "change": percentiles(own.score.value - dense.value, drawn[place] - drawn[0]).fields(),
            "unit": own.score.unit,
            "harness": own.score.harness,
            "unended": own.unended,
        }

    def _counted(self, place: int) -> dict[str, Any]:
        """What follows from the numbers of tokens: means over all prompts of all datasets."""
        plan, decoder = self.methods[place].plan, self.decoder
        prompts: Counter[tuple[int, int]] = sum((each.prompts for each in self.answered[place].values()), Counter())
        parts = [(count, *size, visual_in_layer(plan.pruning, size[1], decoder.num_layers)) for size, count in prompts.items()]
        total = prompts.total()

        def mean(of: Any) -> float:
            return float(sum(count * of(text, visual, layers) for count, text, visual, layers in parts) / total)

        def cost(text: int, layers: Sequence[int], *, with_probes: bool) -> int:
            return prefill_cost(decoder.layer_sizes, text, layers, plan.plan, plan.reduction, with_probes=with_probes)

        decoder_adds = mean(lambda text, visual, layers: cost(text, layers, with_probes=False))
        updates = [_updates(plan, layer) for layer in range(decoder.num_layers)]
        whole = mean(lambda text, visual, layers: visual) * decoder.num_layers or 1.0
        attention, ffn = (
            mean(lambda text, visual, layers, shares=shares: float(np.dot(layers, shares))) / whole
            for shares in zip(*updates, strict=True)
        )
        token_bytes = 2 * decoder.layer_sizes.kv_width * self.itemsize
        return {
            "text_tokens": mean(lambda text, visual, layers: text),
            "visual_tokens": {
                "first": mean(lambda text, visual, layers: layers[0]),
                "kept": mean(lambda text, visual, layers: layers[-1]),
                "mean": mean(lambda text, visual, layers: sum(layers) / len(layers)),
            },
            "updates": {"attention": attention, "ffn": ffn},
            "multiply_adds": {
                "decoder": decoder_adds,
                "probes": mean(lambda text, visual, layers: cost(text, layers, with_probes=True)) - decoder_adds,
                "selection": mean(
                    lambda text, visual, layers: selection_cost(
                        decoder.layer_sizes, decoder.num_layers, text, visual, plan.pruning, self.tower
                    )
                ),
            },
            "kv_bytes": mean(lambda text, visual, layers: token_bytes * (text * len(layers) + sum(layers))),
        }


def check_relative(scores: Mapping[str, Score]) -> None:
    """Raise UserError unless scores can be divided by these, the dense model's."""
    for name, score in scores.items():
        if score.value <= 0:
            raise UserError(
                f"{name}: the dense model's score is {score.value:g}, so no share of it is left to compare; leave it out"
            )


def _updates(plan: PlanFile, layer: int) -> tuple[float, float]:
    """The shares of the attention and FFN updates of visual tokens that a layer computes."""
    attention, ffn = (value_of(name, plan.plan.level(name, layer), plan.reduction) for name in ("attention", "ffn"))
    return float(attention != SKIP), 0.0 if ffn == SKIP else 1.0 if isinstance(ffn, str) else float(ffn)


def _time(own: Any, dense: Any, name: str) -> dict[str, Any]:
    """Medians and the range of the repeats, and the share of the median of the dense model, which took turns."""
    seconds, whole = getattr(own, name), getattr(dense, name)
    return {
        "seconds": median(seconds),
        "range": [min(seconds), max(seconds)],
        "share": median(seconds) / median(whole),
        "repeats": list(seconds),
        "dense_repeats": list(whole),
    }
