"""How close a plan's answers are to the dense model's: fidelity, which is not correctness.

Both models read the same answer by teacher forcing. At each of its tokens the dense model has a distribution p and the plan has
another one, q; their distance is KL(p || q), which is large where the plan loses what the dense model found likely.

The dense model's states behind the final norm are kept at the places of the answers, and its logits are computed again by the
head: the states of a token are a small part of its logits.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.data.samples import Sample
from rlens_jax.engine.model_programs import EVERYWHERE, ROWS
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.profile import part
from rlens_jax.engine.programs import Programs, States, all_rows
from rlens_jax.engine.scoring import BranchOutcomes, TeacherForcing
from rlens_jax.errors import UserError
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.layers import all_finite, best_token, kl_divergence
from rlens_jax.models.prompt import IGNORE, PromptBatch
from rlens_jax.plans import Plan
from rlens_jax.sharding.mesh import split_over, take_rows
from rlens_jax.sharding.model_axis import MODEL, WORK

ROUNDING = 1e-6
"""A divergence of at least minus this is 0, up to rounding in float32; one below it is an error."""

References = Float[Array, "rows A D"]
"""The dense model's states behind the final norm at the places of a pool's answers."""


class Fidelity(TeacherForcing):
    """Scores a plan by a mean over the tokens of an answer.

    Args:
        measure: `kl` is -KL(dense || plan) in nats, at most 0; `agreement` is the share of tokens whose best next token is the
            dense model's, with ties to the lower id.
    """

    def __init__(self, programs: Programs, measure: Literal["kl", "agreement"]):
        super().__init__(programs)
        self._measure = measure
        self._references: dict[Pool, References] = {}
        self._kept_program = programs.program("answer states", _answer_states, (ROWS, ROWS), ROWS)
        self._compare_program = programs.program("fidelity", _compare, (ROWS,) * 3, EVERYWHERE)

    def hold(self, batches: Sequence[Batch]) -> None:
        super().hold(batches)
        for pool in dict.fromkeys(batch.pool for batch in batches):
            if pool not in self._references:
                with part("base states"):
                    self._references[pool] = self._dense(pool)

    def read(self, states: States, batch: Batch) -> Any:
        references = take_rows(self._references[batch.pool], batch.rows, self.programs.mesh)
        return self._compare_program(states, references, batch.inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        numbers, branch, counts, divergences, agree, finite = (np.asarray(part) for part in run)
        mine = counts[:, :, None] & (branch[:, :, None] == np.arange(numbers.shape[1]))  # [rows, A, Q]
        all_finite = (finite[:, :, None] | ~mine).all(axis=1)
        if (low := (divergences < -ROUNDING) & counts & finite).any():
            row, place = np.argwhere(low)[0]
            name = samples[numbers[row, branch[row, place]]].id
            raise UserError(
                f"{name}: the divergence from the dense model is {divergences[row, place]:g}, which cannot be below 0: "
                "this device's arithmetic is too coarse; set compute.matmul_precision to highest"
            )
        lost = np.maximum(divergences.astype(np.float64), 0.0) if self._measure == "kl" else (~agree).astype(np.float64)
        total = np.where(mine & finite[:, :, None], lost[:, :, None], 0.0).sum(axis=1)
        best = 0.0 if self._measure == "kl" else 1.0
        return BranchOutcomes(numbers, best - total / np.maximum(1, mine.sum(axis=1)), all_finite)

    def release(self) -> None:
        super().release()
        self._references.clear()

    def _dense(self, pool: Pool) -> References:
        programs, parts = self.programs, []
        for batch in pool.batches():
            states = programs.embed(batch.inputs.text_ids, batch.visual)
            states = programs.layers(states, batch.inputs, Plan(), 0, programs.config.num_layers)
            parts.append(self._kept_program(states, batch.inputs))
        joined = split_over(_joined, programs.mesh, (WORK, MODEL), (ROWS,) * len(parts), ROWS)
        return jax.jit(joined)(*parts)


def _joined(*parts: Array) -> Array:
    return jnp.concatenate(parts)


def _answer_states(model: VisionLanguageModel, states: States, batch: PromptBatch) -> Float[Array, "B A D"]:
    return model.decoder.norm(_at_answers(states[0], batch))


def _compare(
    model: VisionLanguageModel, states: States, references: Float[Array, "B A D"], batch: PromptBatch
) -> tuple[Int[Array, "B Q"], Int[Array, "B A"], Bool[Array, "B A"], Float[Array, "B A"], Bool[Array, "B A"], Bool[Array, "B A"]]:
    """On every device: the samples of the branches; for each answer place its branch, whether it counts, KL(dense || plan),
    whether both have the same best token, and whether all numbers are finite.
    """
    x, scored = states
    dense, logits = model.decoder.read_out(references), model.decoder.logits(_at_answers(x, batch))
    finite = scored[:, None] & all_finite(logits) & all_finite(dense)
    counts = jnp.asarray(batch.answer_targets) != IGNORE
    agree = best_token(dense) == best_token(logits)
    return all_rows((batch.samples, batch.answer_branch, counts, kl_divergence(dense, logits), agree, finite))


def _at_answers(x: Float[Array, "B T D"], batch: PromptBatch) -> Float[Array, "B A D"]:
    return jnp.take_along_axis(x, jnp.asarray(batch.answer_slots)[:, :, None], axis=1)
