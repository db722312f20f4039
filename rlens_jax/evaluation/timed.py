"""Samples as a deployed model answers them under a plan, for measured times and memory; the dense model takes turns with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from rlens_jax.data.samples import Sample
from rlens_jax.engine.deployed_model import DeployedModel, Prefilled
from rlens_jax.engine.peak_memory import PeakMemory, peak_memory
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.preparing import Resize, as_it_is
from rlens_jax.engine.timing import time_side_by_side
from rlens_jax.evaluation.evaluation import Times, VariantTime
from rlens_jax.families.generation_config import Decoding
from rlens_jax.plan_file import PlanFile

TIMED_TOKENS = 32
"""New tokens in the timed decoding, even if the answers end earlier."""
TIMED = Decoding(TIMED_TOKENS)
"""Without a repetition penalty, whatever the answers have."""


@dataclass(frozen=True)
class Timed:
    """Samples under a plan; `batches` are these samples, prepared."""

    model: DeployedModel
    plan: PlanFile
    samples: Sequence[Sample]
    batches: Sequence[Batch]
    sharing: bool
    resized: Resize = as_it_is

    def prefill(self) -> list[Prefilled]:
        """The decoder's prefill, up to the first new token."""
        return [self._prefilled(batch) for batch in self.batches]

    def first_token(self) -> list[jax.Array]:
        """From image files and texts to the first new token."""
        prepared = self.model.prepare(self.samples, TIMED, sharing=self.sharing, marked=self.plan.marked, resized=self.resized)
        return [self._prefilled(batch).first for batch in prepared.batches]

    def decode(self, prefilled: Sequence[Prefilled]) -> list[Any]:
        """All new tokens after the first."""
        pairs = zip(prefilled, self.batches, strict=True)
        return [self.model.programs.decode(each, batch.inputs, TIMED_TOKENS, to_the_end=True) for each, batch in pairs]

    def peak(self) -> PeakMemory:
        """The most memory of prefill and decoding, which are compiled."""
        return peak_memory(lambda: self.decode(self.prefill()), self._analyses)

    def _prefilled(self, batch: Batch) -> Prefilled:
        programs = self.model.programs
        return programs.prefill(programs.put(batch.visual), batch.inputs, self.plan, TIMED_TOKENS)

    def _analyses(self) -> list[Any]:
        programs = self.model.programs
        program = programs.prefill_program(self.plan, TIMED_TOKENS)
        lowered = (program.lower(programs.put(batch.visual), batch.inputs) for batch in self.batches)
        return [each.compile().memory_analysis() for each in lowered]


def timed_pair(
    model: DeployedModel, samples: Sequence[Sample], plan: PlanFile, *, sharing: bool, resized: Resize = as_it_is
) -> tuple[Timed, Timed]:
    """The samples of the fullest batch under the dense model, and under the plan with images resized."""
    prompts = model.prepare(samples, TIMED, sharing=sharing)
    batch = max(prompts.batches, key=lambda batch: len(batch.members))
    members = [samples[number] for number in batch.members]
    dense = Timed(model, PlanFile(), members, [batch], sharing)
    if resized is as_it_is and not plan.marked:
        return dense, Timed(model, plan, members, [batch], sharing)
    own = model.prepare(members, TIMED, sharing=sharing, marked=plan.marked, resized=resized).batches
    return dense, Timed(model, plan, members, own, sharing, resized)


def measure_times(dense: Timed, timed: Timed, repeats: int) -> Times:
    """The times of both; they take turns, so that a slow moment of the machine hits both. The shape is the dense one's."""
    pair = dense, timed
    prefilled = [each.prefill() for each in pair]
    calls: list[Callable[[], Any]] = [
        *(each.prefill for each in pair),
        *(each.first_token for each in pair),
        *(partial(each.decode, states) for each, states in zip(pair, prefilled, strict=True)),
    ]
    measured = time_side_by_side(calls, repeats)
    (batch,) = dense.batches
    bucket, (rows, branches) = batch.inputs.layout.bucket, batch.inputs.samples.shape
    return Times(
        rows=rows,
        branches=branches,
        prompts=len(batch.members),
        text_slots=bucket.text,
        visual_slots=bucket.visual,
        dense=VariantTime(*measured[0::2]),
        plan=VariantTime(*measured[1::2]),
        decode_steps=TIMED_TOKENS - 1,
    )
