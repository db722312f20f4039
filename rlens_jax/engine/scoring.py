"""How a batch is evaluated under plans by teacher forcing (or by generating, `rlens_jax.engine.generating`).

Teacher forcing starts a candidate from its base's stored states at the first layer in which they differ. Every layer goes
through one compiled program, so the result is bit-equal to a run from the first layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import Batch
from rlens_jax.engine.programs import Programs, States
from rlens_jax.engine.schedule import StoredStates, first_layer
from rlens_jax.plan import Plan


class RowOutcomes(NamedTuple):
    """For each branch [rows, Q] of all groups: its sample or `FILLER`, is the answer right, were all numbers finite."""

    sample: np.ndarray
    right: np.ndarray
    finite: np.ndarray


@runtime_checkable
class Scoring(Protocol):
    """An objective, as the evaluator uses it."""

    programs: Programs

    def cost(self, base: Plan, plan: Plan) -> int:
        """The number of layers to run for `plan`."""

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        """Start work on the devices: group g evaluates `plans[g]` on block `blocks[g]`; returns the input of `finish`."""

    def finish(self, run: Any, samples: Sequence[Sample]) -> RowOutcomes:
        """Wait for started work and read its outcomes."""

    def state_bytes(self, batch: Batch) -> int:
        """Memory of the batch's base states on a device."""

    def release(self) -> None:
        """Drop all base states."""


class TeacherForcing:
    """One pass over prompt and answer: greedy decoding gives exactly these tokens if each is the argmax."""

    def __init__(self, programs: Programs):
        self.programs = programs
        self._states: dict[Batch, _BaseStates] = {}

    def cost(self, base: Plan, plan: Plan) -> int:
        num_layers = self.programs.config.num_layers
        return num_layers - first_layer(base, plan, num_layers)

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        programs, num_layers = self.programs, self.programs.config.num_layers
        firsts = [first_layer(base, plan, num_layers) for plan in plans]
        base_states = self._states.setdefault(batch, _BaseStates(programs, batch))
        inputs = programs.route(batch.inputs, blocks)
        entering: States | None = None
        for first in sorted(set(firsts)):
            states = programs.route(base_states.entering(first, base), blocks)
            mine = [first == layer for layer in firsts]
            entering = states if entering is None else programs.choose(mine, states, entering)
        assert entering is not None
        return programs.outcome(programs.layers(entering, inputs, plans, firsts, num_layers), inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> RowOutcomes:
        return read_outcome(run)

    def state_bytes(self, batch: Batch) -> int:
        slots = batch.inputs.layout.bucket.slots * len(batch.inputs.samples) // self.programs.groups
        config = self.programs.config
        return slots * config.width * self.programs.dtype.itemsize * config.num_layers

    def release(self) -> None:
        self._states.clear()


def read_outcome(run: Any) -> RowOutcomes:
    """The result of `Programs.outcome`, on the host."""
    sample, right, _, finite = (np.asarray(part) for part in run)
    return RowOutcomes(sample, right, finite)


class _BaseStates:
    """The states that enter the layers of one batch under one plan, made when they are first needed."""

    def __init__(self, programs: Programs, batch: Batch):
        self._programs = programs
        self._batch = batch
        self._stored = StoredStates()
        self._states: list[States] = []

    def entering(self, layer: int, plan: Plan) -> States:
        """The states that enter `layer` under `plan`."""
        programs, inputs = self._programs, self._batch.inputs
        upkeep = self._stored.require(plan, layer)
        del self._states[upkeep.kept :]
        if not upkeep.kept:
            self._states.append(programs.embed(inputs.text_ids, self._batch.visual))
        plans = [plan] * programs.groups
        for first in upkeep.layers:
            starts = [first] * programs.groups
            self._states.append(programs.layers(self._states[first], inputs, plans, starts, first + 1))
        return self._states[layer]
