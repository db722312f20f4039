"""How close a plan's answers are to the dense model's: fidelity, which is not correctness.

Both models read the same answer by teacher forcing. At each of its tokens the dense model has a distribution p and the plan has
another one, q; their distance is KL(p || q), which is large where the plan loses what the dense model found likely.

The dense model's states behind the final norm are kept at the places of the answers, and its logits are computed again by the
head: the states of a token are a small part of its logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlens_jax.config import Measure
from rlens_jax.data.samples import Sample
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.generating import Generating
from rlens_jax.engine.model_programs import EVERYWHERE, ROWS
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.profile import part
from rlens_jax.engine.programs import Programs, States, all_rows
from rlens_jax.engine.scoring import BranchOutcomes, Scoring, TeacherForcing
from rlens_jax.engine.session import LoadedModel
from rlens_jax.errors import UserError
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.layers import all_finite, best_token, kl_divergence
from rlens_jax.models.prompt import FILLER, IGNORE, PromptBatch
from rlens_jax.plans import Plan
from rlens_jax.search.journal import Record
from rlens_jax.sharding.mesh import split_over, take_rows
from rlens_jax.sharding.model_axis import MODEL, WORK

ROUNDING = 1e-6
"""A divergence of at least minus this is 0, up to rounding in float32; one below it is an error."""

FidelityMeasure = Literal["kl", "agreement", "first_token_kl"]
FIDELITY: tuple[FidelityMeasure, ...] = get_args(FidelityMeasure)

References = Float[Array, "rows A D"]
"""The dense model's states behind the final norm at the places of a pool's answers."""


class Fidelity(TeacherForcing):
    """Scores a plan by a mean over the tokens of an answer.

    Args:
        measure: `kl` is -KL(dense || plan) in nats, at most 0; `agreement` is the share of tokens whose best next token is the
            dense model's, with ties to the lower id; `first_token_kl` is -KL(plan || dense) at the first token alone, as ShortV
            (arXiv 2504.00502) measures, here in float32.
    """

    def __init__(self, programs: Programs, measure: FidelityMeasure):
        super().__init__(programs)
        self._measure = measure
        self.best = 1.0 if measure == "agreement" else 0.0
        self._references: dict[Pool, References] = {}
        self._kept_program = programs.program("answer states", _answer_states, (ROWS, ROWS), ROWS)
        self._compare_program = programs.program("fidelity", partial(_compare, measure), (ROWS,) * 3, EVERYWHERE)

    def read(self, states: States, batch: Batch) -> Any:
        if batch.pool not in self._references:  # only now: a resumed run may evaluate nothing
            with part("base states"):
                self._references[batch.pool] = self._made(batch.pool)
        references = take_rows(self._references[batch.pool], batch.rows, self.programs.mesh)
        return self._compare_program(states, references, batch.inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        numbers, branch, counts, lost, finite = (np.asarray(part) for part in run)
        if (low := (lost < -ROUNDING) & counts & finite).any():
            row, place = np.argwhere(low)[0]
            name = samples[numbers[row, branch[row, place]]].id
            raise UserError(
                f"{name}: the divergence from the dense model is {lost[row, place]:g}, which cannot be below 0: "
                "this device's arithmetic is too coarse; set compute.matmul_precision to highest"
            )
        if self._measure == "first_token_kl":
            counts = counts & (np.diff(branch, axis=1, prepend=-1) != 0)
        mine = counts[:, :, None] & (branch[:, :, None] == np.arange(numbers.shape[1]))  # [rows, A, Q]
        all_finite = (finite[:, :, None] | ~mine).all(axis=1)
        values = np.maximum(lost.astype(np.float64), 0.0)
        lost_by = self._over_tokens(np.where(mine & finite[:, :, None], values[:, :, None], 0.0), mine.sum(axis=1))
        return BranchOutcomes(numbers, self.best - lost_by, all_finite)

    def _over_tokens(self, values: Float[np.ndarray, "rows A Q"], counts: Int[np.ndarray, "rows Q"]) -> np.ndarray:
        """What a branch loses, from what its tokens lose."""
        return values.sum(axis=1) / np.maximum(1, counts)

    def dense(self, batch: Batch) -> States:
        """The dense model's last states at the places of the answers, computed from the first layer on."""
        programs = self.programs
        states = programs.embed(batch.inputs.text_ids, batch.visual)
        states = programs.layers(states, batch.inputs, Plan(), 0, programs.config.num_layers - 1)
        return programs.last_layer(states, batch.inputs, Plan())

    def release(self) -> None:
        super().release()
        self._references.clear()

    def _made(self, pool: Pool) -> References:
        parts = [self._kept_program(self.dense(batch), batch.inputs) for batch in pool.batches()]
        joined = split_over(_joined, self.programs.mesh, (WORK, MODEL), (ROWS,) * len(parts), ROWS)
        return jax.jit(joined)(*parts)


class LargestDivergence(Fidelity):
    """Minus the largest KL(dense || plan) at one token of an answer, which a mean over long answers hides."""

    def __init__(self, programs: Programs):
        super().__init__(programs, "kl")

    def _over_tokens(self, values: Float[np.ndarray, "rows A Q"], counts: Int[np.ndarray, "rows Q"]) -> np.ndarray:
        return values.max(axis=1)


class AnswerAgreement(Fidelity):
    """The share of the dense model's own answer that stays best, where it did not answer about these images themselves."""

    def __init__(self, programs: Programs):
        super().__init__(programs, "agreement")
        self._agree_program = programs.program("answer agreement", _agree, (ROWS, ROWS), EVERYWHERE)

    def read(self, states: States, batch: Batch) -> Any:
        return self._agree_program(states, batch.inputs)


def _joined(*parts: Array) -> Array:
    return jnp.concatenate(parts)


def _answer_states(model: VisionLanguageModel, states: States, batch: PromptBatch) -> Float[Array, "B A D"]:
    return model.decoder.norm(_at_answers(states[0], batch))


def _compare(
    measure: FidelityMeasure, model: VisionLanguageModel, states: States, references: Float[Array, "B A D"], batch: PromptBatch
) -> tuple[Array, ...]:
    """Of all groups' rows: the samples of the branches [rows, Q]; for each answer place [rows, A] its branch, whether it counts,
    what is lost there (a divergence, or 1 for another best token), and whether all numbers are finite.
    """
    x, scored, _ = states
    dense, logits = model.decoder.read_out(references), model.decoder.logits(_at_answers(x, batch))
    if measure == "agreement":
        lost = (best_token(dense) != best_token(logits)).astype(jnp.float32)
    else:
        lost = kl_divergence(dense, logits) if measure == "kl" else kl_divergence(logits, dense)
    finite = scored[:, None] & all_finite(logits) & all_finite(dense)
    counts = jnp.asarray(batch.answer_targets) != IGNORE
    return all_rows((batch.samples, batch.answer_branch, counts, lost, finite))


def _agree(model: VisionLanguageModel, states: States, batch: PromptBatch) -> tuple[Array, ...]:
    """As `_compare`, with the tokens of the answers as the dense model's best ones."""
    x, scored, _ = states
    logits, targets = model.decoder.logits(_at_answers(x, batch)), jnp.asarray(batch.answer_targets)
    lost = (best_token(logits) != targets).astype(jnp.float32)
    finite = scored[:, None] & all_finite(logits)
    return all_rows((batch.samples, batch.answer_branch, targets != IGNORE, lost, finite))


def _at_answers(x: Float[Array, "B T D"], batch: PromptBatch) -> Float[Array, "B A D"]:
    return jnp.take_along_axis(x, jnp.asarray(batch.answer_slots)[:, :, None], axis=1)


def noise_floor(evaluator: Evaluator, split: str) -> float:
    """What a score loses by rounding alone: the dense model against itself in batches of another shape.

    It is measured on the samples of the bucket that has most rows, since each shape is compiled; the journal keeps it. The score
    of a plan is a sum over the datasets, and so is this.
    """
    scoring, samples = evaluator.scoring, evaluator.splits[split]
    assert isinstance(scoring, Fidelity)
    name = f"{split}, other batches"
    known = evaluator.journal.outcomes(name, Plan(), len(samples.samples))
    if np.isnan(known).all():
        pool = max(samples.pools, key=lambda pool: pool.rows)
        found = np.full(len(samples.samples), -np.inf)
        scoring.hold(pool.batches())
        for batch in _other_batches(pool):
            numbers, outcomes, finite = scoring.finish(scoring.read(scoring.dense(batch), batch), samples.samples)
            real = (numbers != FILLER) & finite
            np.maximum.at(found, numbers[real], outcomes[real])
        members = np.flatnonzero(np.isfinite(found))
        evaluator.journal.append(Record(name, Plan(), members, found[members], 0.0))
        evaluator.checkpoint()
        known = evaluator.journal.outcomes(name, Plan(), len(found))
    return len(samples.datasets) * (scoring.best - float(np.nanmean(known)))


def largest_divergences(evaluator: Evaluator, split: str, plans: Mapping[str, Plan]) -> dict[str, float]:
    """By the plans' names, the largest KL(dense || plan) in nats at one token of all answers of a split."""
    scoring, name = LargestDivergence(evaluator.scoring.programs), f"{split}, largest divergence"
    own = replace(evaluator, scoring=scoring, splits={name: evaluator.splits[split]})
    outcomes = own.chain(name, list(plans.values()))
    lowest = (min(float(values.min()) for values in each.values()) for each in outcomes)
    return {plan: 0.0 - value for plan, value in zip(plans, lowest, strict=True)}


def _other_batches(pool: Pool) -> list[Batch]:
    """All rows in batches of half as many; if a batch has one row, of that row twice."""
    rows = np.broadcast_to(np.arange(pool.rows, dtype=np.int32), pool.samples.shape[:2])
    if pool.block_rows == 1:
        return [Batch(pool, rows[:, [number, number]]) for number in range(pool.rows)]
    size = pool.block_rows // 2 if pool.block_rows % 2 == 0 else 1
    return [Batch(pool, rows[:, first : first + size]) for first in range(0, pool.rows, size)]


def scoring_of(programs: Programs, loaded: LoadedModel, measure: Measure) -> Scoring:
    """What gives a sample its outcome."""
    if measure == "generation":
        return Generating(programs, loaded.preparer.chat.decode)
    if measure == "teacher_forced" or measure == "exact_agreement":
        return TeacherForcing(programs)
    return Fidelity(programs, measure)
