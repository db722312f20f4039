"""Measured time of a plan against the dense model, side by side in one process, on the first batch of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.deployment.deployed_model import DeployedModel
from rlens_jax.engine.inputs import FILLER
from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.plan_file import PlanFile

TIMED_TOKENS = 32
"""New tokens that decoding is timed on; however early the answers end."""


@dataclass(frozen=True)
class VariantTime:
    """Seconds of each repeat.

    Attributes:
        prefill: the decoder's prefill of a batch, up to the first new token.
        first_token: from image files and texts to the first new token: decoding of images, preprocessing, vision tower, prefill.
        decode: the `TIMED_TOKENS - 1` steps after the first token.
    """

    prefill: tuple[float, ...]
    first_token: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Times:
    """What was timed: `rows` prompts (some may only fill the batch) of a bucket of text and visual slots."""

    rows: int
    prompts: int
    text_slots: int
    visual_slots: int
    dense: VariantTime
    plan: VariantTime

    @property
    def steps(self) -> int:
        """Decoding steps that are timed."""
        return TIMED_TOKENS - 1


def time_variants(model: DeployedModel, samples: Sequence[Sample], plan: PlanFile, repeats: int) -> Times:
    """Time both variants on the fullest batch of the samples; they take turns, so that a slow moment meets both."""
    split = model.prepare(samples, TIMED_TOKENS)
    batch = max(split.batches, key=lambda batch: int((np.asarray(batch.inputs.layout.sample) != FILLER).sum()))
    numbers = np.asarray(batch.inputs.layout.sample)
    own = [split.samples[number] for number in numbers if number != FILLER]
    plans = (PlanFile(), plan)

    visual = model.programs.put(batch.visual)

    def prefill(given: PlanFile) -> Any:
        return model.programs.prefill(visual, batch.inputs, given, TIMED_TOKENS)

    def first_token(given: PlanFile) -> Any:
        prepared = model.prepare(own, TIMED_TOKENS)
        return [
            model.programs.prefill(model.programs.put(part.visual), part.inputs, given, TIMED_TOKENS).first
            for part in prepared.batches
        ]

    prefilled = [jax.block_until_ready(prefill(given)) for given in plans]

    def decode(variant: int) -> Any:
        return model.programs.decode(prefilled[variant], batch.inputs, TIMED_TOKENS, to_the_end=True)

    calls = [lambda given=given: prefill(given) for given in plans]
    calls += [lambda given=given: first_token(given) for given in plans]
    calls += [lambda variant=variant: decode(variant) for variant in range(len(plans))]
    measured = time_side_by_side(calls, repeats)
    bucket = batch.inputs.layout.bucket
    dense, reduced = (VariantTime(*measured[variant :: len(plans)]) for variant in range(len(plans)))
    return Times(len(numbers), len(own), bucket.text, bucket.visual, dense, reduced)
