"""How a batch is evaluated under a plan by teacher forcing (or by generating, `rlens_jax.engine.generating`).

Teacher forcing starts a candidate from its base's stored states at the first layer in which they differ. Every layer goes
through one compiled program, so the result is bit-equal to a run from the first layer.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.profile import part
from rlens_jax.engine.programs import Programs, States
from rlens_jax.engine.schedule import first_layer
from rlens_jax.engine.stored_states import StoredStates, state_bytes
from rlens_jax.plans import Plan


class BranchOutcomes(NamedTuple):
    """For each branch of each row of all groups, all [rows, Q]."""

    sample: np.ndarray
    """Its sample's number, or `FILLER`."""
    outcome: np.ndarray
    """Whether its answer is right, or another number that is larger for a better answer."""
    finite: np.ndarray
    """Whether all scores and logits were finite."""


@runtime_checkable
class Scoring(Protocol):
    """An objective, as the evaluator uses it."""

    programs: Programs

    def hold(self, batches: Sequence[Batch]) -> None:
        """Keep base states for the rows of these batches, and for no others."""

    def start(self, batch: Batch, base: Plan, plan: Plan) -> Any:
        """Start the evaluation of a plan on a held batch on the devices, from the states of `base`; the input of `finish`."""

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        """Wait for started work and read its outcomes."""

    def state_bytes(self, pool: Pool) -> int:
        """Memory of a row's base states on a device."""

    def release(self) -> None:
        """Drop all base states."""


class TeacherForcing:
    """One pass over prompt and answer: greedy decoding gives exactly these tokens if each is the argmax."""

    def __init__(self, programs: Programs):
        self.programs = programs
        self._states: dict[Pool, StoredStates] = {}

    def hold(self, batches: Sequence[Batch]) -> None:
        rows: dict[Pool, list[np.ndarray]] = defaultdict(list)
        for batch in batches:
            rows[batch.pool].append(batch.rows)
        wanted = {pool: np.sort(np.concatenate(parts, axis=1)) for pool, parts in rows.items()}
        self._states = {pool: states for pool, states in self._states.items() if pool in wanted}
        for pool, numbers in wanted.items():
            if pool not in self._states or not np.array_equal(self._states[pool].rows, numbers):
                self._states.pop(pool, None)  # first, to make room
                self._states[pool] = StoredStates(self.programs, pool, numbers)

    def start(self, batch: Batch, base: Plan, plan: Plan) -> Any:
        programs, num_layers = self.programs, self.programs.config.num_layers
        first = first_layer(base, plan, num_layers)
        with part("base states"):
            states = self._states[batch.pool].entering(batch, first, base)
        with part("candidates"):
            if first < num_layers - 1:
                states = programs.layers(states, batch.inputs, plan, first, num_layers - 1)
            return self.read(programs.last_layer(states, batch.inputs, plan), batch)

    def read(self, states: States, batch: Batch) -> Any:
        """Start to read the outcomes of a batch from the last states at the places of its answers."""
        return self.programs.outcome(states, batch.inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        return read_outcome(run)

    def state_bytes(self, pool: Pool) -> int:
        return state_bytes(self.programs, pool)

    def release(self) -> None:
        self._states.clear()


def read_outcome(run: Any) -> BranchOutcomes:
    """The result of `Programs.outcome`, on the host."""
    sample, right, _, finite = (np.asarray(part) for part in run)
    return BranchOutcomes(sample, right, finite)
