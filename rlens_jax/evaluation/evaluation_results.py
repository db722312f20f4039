"""A finished evaluation as values, and as the text of its files.

`evaluation.json`, which `evaluation.schema.json` describes, holds nothing that differs between runs of a configuration.
`timing.json` holds the measured times.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from rlens_jax.evaluation.evaluation_config import EvaluationConfig
from rlens_jax.files import json_text
from rlens_jax.metrics.score import Score
from rlens_jax.search.bootstrap import Interval

SCHEMA = "rlens-evaluation/1"
TIMING_SCHEMA = "rlens-evaluation-timing/1"


@dataclass(frozen=True)
class VariantResult:
    """The result of one variant on a dataset.

    Attributes:
        score: by the dataset's rules; None if its answers are withheld.
        interval: 95 % bootstrap interval of the score's value.
        unended: number of answers that ran out of tokens before the model ended its turn.
    """

    score: Score | None
    interval: Interval | None
    unended: int


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the decoder layers in the prefill, means over the questions.

    `saved` and `saved_with_probes` are shares of the dense cost.
    """

    dense: float
    reduced: float
    reduced_with_probes: float
    saved: float
    saved_with_probes: float


@dataclass(frozen=True)
class DatasetResult:
    """The results of all variants on a dataset.

    Attributes:
        digest: hash of the questions.
        questions: number of questions.
        text_tokens: text tokens per prompt, mean.
        visual_tokens: visual tokens per prompt, mean.
        cost: cost of the plan.
        variants: "plan", and "dense" with a baseline.
        difference: score of the plan minus score of the dense model, with the interval of paired draws.
    """

    digest: str
    questions: int
    text_tokens: float
    visual_tokens: float
    cost: Cost
    variants: Mapping[str, VariantResult]
    difference: Interval | None


@dataclass(frozen=True)
class VariantTime:
    """Measured seconds of one variant, one entry per repeat.

    Attributes:
        prefill: the decoder's prefill of a batch, up to the first new token.
        first_token: from image files and texts to the first new token: image decoding, preprocessing, vision tower, prefill.
        decode: the decoding steps after the first token.
    """

    prefill: tuple[float, ...]
    first_token: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Times:
    """Measured times of both variants on one batch.

    Attributes:
        rows: rows of the batch, including filler rows.
        prompts: rows that hold a prompt.
        text_slots, visual_slots: the batch's bucket.
        dense, plan: the times.
        decode_steps: number of timed decoding steps.
    """

    rows: int
    prompts: int
    text_slots: int
    visual_slots: int
    dense: VariantTime
    plan: VariantTime
    decode_steps: int


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation. `times` is None if nothing was timed."""

    config: EvaluationConfig
    model_hash: str
    model_type: str
    num_layers: int
    device: str
    versions: Mapping[str, str]
    datasets: Mapping[str, DatasetResult]
    times: Times | None


def evaluation_json(result: Evaluation) -> str:
    """The text of evaluation.json."""
    config = result.config
    return json_text(
        {
            "schema": SCHEMA,
            "model": {
                "path": config.model,
                "hash": result.model_hash,
                "model_type": result.model_type,
                "num_layers": result.num_layers,
            },
            "plan": {"label": config.plan.label(), **config.settings()["plan"]},
            "datasets": {name: _dataset(name, part) for name, part in result.datasets.items()},
            "configuration": {
                **config.settings(),
                "data": list(config.data),
                "limit": config.limit,
                "bootstrap_samples": config.bootstrap_samples,
            },
            "device": result.device,
            "versions": dict(result.versions),
        }
    )


def timing_json(times: Times) -> str:
    """The text of timing.json."""
    fields = dataclasses.asdict(times)
    for name, variant in (("dense", times.dense), ("plan", times.plan)):
        fields[name]["tokens_per_second"] = tokens_per_second(times, variant)
    return json_text({"schema": TIMING_SCHEMA, **fields})


def tokens_per_second(times: Times, variant: VariantTime) -> float:
    """New tokens of all rows per second, from the median decoding time; prefill not counted."""
    return times.rows * times.decode_steps / median(variant.decode)


def summary(result: Evaluation) -> str:
    """The text for the terminal."""
    lines = [f"{result.config.model}, plan: {result.config.plan.label()}"]
    for name, part in result.datasets.items():
        lines.append(
            f"{name}: {part.questions} questions, FLOPs saved {part.cost.saved:.1%} "
            f"({part.cost.saved_with_probes:.1%} with probes)"
        )
        for variant, scored in part.variants.items():
            unended = f", {scored.unended} answers cut off" if scored.unended else ""
            if scored.score is None or scored.interval is None:
                lines.append(f"  {variant:<6} not scored here: the answers are withheld{unended}")
            else:
                low, high = scored.interval.low, scored.interval.high
                lines.append(
                    f"  {variant:<6}{scored.score.value:8.2f} {scored.score.unit}  [{low:.2f}, {high:.2f}]  "
                    f"({scored.score.harness}){unended}"
                )
        if part.difference is not None:
            change = part.difference
            lines.append(f"  change{change.value:+8.2f}  [{change.low:+.2f}, {change.high:+.2f}]")
    if (times := result.times) is not None:
        lines.append(
            f"times of {times.prompts} prompts in {times.text_slots} + {times.visual_slots} slots, medians, dense -> plan:"
        )
        for label, field in (("prefill", "prefill"), ("to first token", "first_token")):
            dense, plan = median(getattr(times.dense, field)), median(getattr(times.plan, field))
            lines.append(f"  {label:<15}{dense * 1e3:10.1f} ms -> {plan * 1e3:10.1f} ms ({1 - plan / dense:+.1%} saved)")
        rates = [tokens_per_second(times, variant) for variant in (times.dense, times.plan)]
        lines.append(f"  {'decoding':<15}{rates[0]:10.1f} -> {rates[1]:10.1f} tokens/s")
    return "\n".join(lines)


def _dataset(name: str, part: DatasetResult) -> dict[str, Any]:
    return {
        "digest": part.digest,
        "questions": part.questions,
        "text_tokens": part.text_tokens,
        "visual_tokens": part.visual_tokens,
        "multiply_adds": dataclasses.asdict(part.cost),
        "variants": {
            variant: {
                "predictions": f"{variant}/{name}.tsv",
                "unended": scored.unended,
                "score": None if scored.score is None else _score(scored.score, scored.interval),
            }
            for variant, scored in part.variants.items()
        },
        "difference": None if part.difference is None else part.difference.fields(),
    }


def _score(score: Score, interval: Interval | None) -> dict[str, Any]:
    assert interval is not None
    return {**interval.fields(), "unit": score.unit, "harness": score.harness, "breakdown": dict(score.breakdown)}
