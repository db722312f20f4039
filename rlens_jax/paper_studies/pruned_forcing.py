"""Teacher forcing with token pruning: a prefill that drops visual tokens on its way (`rlens_jax.models.pruned`).

Stored states of a base plan would hold other tokens, so every plan is computed from its first layer.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.model_programs import ROWS
from rlens_jax.engine.programs import Programs, States, own_plan
from rlens_jax.engine.scoring import RowOutcomes, read_outcome
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plan import Plan
from rlens_jax.pruning import Pruning


class PrunedForcing:
    """An `rlens_jax.engine.scoring.Scoring` with one more program: a whole prefill with pruning.

    Args:
        programs: the programs of the search.
        pruning: how tokens are dropped; static, whereas the plan is data.
    """

    def __init__(self, programs: Programs, pruning: Pruning):
        def prefill(model: Any, visual: Array, batch: PromptBatch, plans: TracedPlan) -> States:
            plan, key = own_plan(plans), programs.random_key()
            states = run_prompt(model.decoder, visual, batch, plan, programs.reduction, key, programs.kernel, pruning)
            return states.x, states.scored

        self._programs = programs
        self._prefill = programs.program("pruned", prefill, (ROWS,) * 3, ROWS)

    def cost(self, base: Plan, plan: Plan) -> int:
        return self._programs.config.num_layers

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        programs = self._programs
        inputs, visual = programs.route((batch.inputs, programs.put(batch.visual)), blocks)
        return programs.outcome(self._prefill(visual, inputs, programs.traced(plans)), inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> RowOutcomes:
        return read_outcome(run)

    def state_bytes(self, batch: Batch) -> int:
        return 0  # no states are stored

    def release(self) -> None:
        pass
