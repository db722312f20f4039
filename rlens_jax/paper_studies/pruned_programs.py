"""Teacher forcing with token pruning: a plan's prefill that is rid of visual tokens on its way (`rlens_jax.models.pruned`).

Tokens are dropped, so there are no states of a base to go on from: every plan is computed from its first layer.
Axis letters: B batch, T packed slots, P visual slots, D width.
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.model_programs import ROWS
from rlens_jax.engine.programs import Programs, States, own_plan
from rlens_jax.engine.scoring import RowOutcomes, read_outcome
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plan import Plan, Reduction
from rlens_jax.pruning import Pruning


class PrunedPrograms(Programs):
    """As `Programs`, with one more: a whole prefill with pruning, which is static; the plan is data."""

    def __init__(
        self,
        model: Any,
        mesh: Mesh,
        reduction: Reduction,
        pruning: Pruning,
        *,
        seed: int,
        stop_token: int,
    ):
        super().__init__(model, mesh, reduction, seed=seed, new_tokens=1, stop_token=stop_token)
        self._pruning = pruning
        self._pruned = self.program("pruned", self._pruned_impl, (ROWS,) * 3, ROWS)

    def pruned(self, visual: Float[Array, "B P D"], batch: PromptBatch, plans: Sequence[Plan]) -> States:
        """The last states of each group under its plan; text slots are those of the batch."""
        return self._pruned(visual, batch, self.traced(plans))

    def _pruned_impl(self, model: Any, visual: Array, batch: PromptBatch, plans: TracedPlan) -> States:
        states = run_prompt(
            model.decoder,
            visual,
            batch,
            own_plan(plans),
            self.reduction,
            self.random_key(),
            self.kernel,
            self._pruning,
        )
        return states.x, states.scored


class PrunedForcing:
    """`rlens_jax.engine.scoring.Scoring` with pruning."""

    def __init__(self, programs: PrunedPrograms):
        self._programs = programs

    def cost(self, base: Plan, plan: Plan) -> int:
        return self._programs.config.num_layers

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        inputs, visual = self._programs.route((batch.inputs, self._programs.put(batch.visual)), blocks)
        return self._programs.outcome(self._programs.pruned(visual, inputs, plans), inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> RowOutcomes:
        return read_outcome(run)

    def state_bytes(self, batch: Batch) -> int:
        return 0  # nothing is kept

    def release(self) -> None:
        """Nothing is kept."""
