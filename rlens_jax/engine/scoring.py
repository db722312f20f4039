"""How a batch is evaluated under plans: by teacher forcing, or by generating.

Teacher forcing starts a candidate from its base's stored states at the layer in which they differ. Every layer goes through
one compiled program, which makes that bit-equal to a run from the start.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import FILLER, Batch
from rlens_jax.engine.programs import Programs, States
from rlens_jax.plan import Plan


@runtime_checkable
class Scoring(Protocol):
    """What the evaluator asks of an objective."""

    def first_layer(self, base: Plan, plan: Plan) -> int:
        """The lowest layer that is computed anew for `plan`."""

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        """Hand work to the devices: group g evaluates `plans[g]` on block `blocks[g]` of the batch; returns what
        `finish` needs.
        """

    def finish(self, run: Any, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per row of all groups: its sample's number or `FILLER`, is the answer right (bool), and were all probe
        scores numbers (bool).
        """

    def state_bytes(self, batch: Batch) -> int:
        """Memory that the batch's base states take on a device."""

    def release(self) -> None:
        """Forget all base states."""


class TeacherForcing:
    """One pass over prompt and answer: greedy decoding would give exactly these tokens if each is the argmax."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._states: dict[int, _BaseStates] = {}

    def first_layer(self, base: Plan, plan: Plan) -> int:
        difference = base.lowest_difference(plan)
        return self._programs.config.num_layers - 1 if difference is None else difference

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        programs, last = self._programs, self._programs.config.num_layers
        firsts = [self.first_layer(base, plan) for plan in plans]
        if id(batch) not in self._states:
            self._states[id(batch)] = _BaseStates(programs, batch)
        base_states = self._states[id(batch)]
        inputs = programs.route(batch.inputs, blocks)
        entering: States | None = None
        for first in sorted(set(firsts)):
            states = programs.route(base_states.at(base, first), blocks)
            own = [first == layer for layer in firsts]
            entering = states if entering is None else programs.choose(own, states, entering)
        assert entering is not None
        return programs.outcome(programs.layers(entering, inputs, plans, firsts, last), inputs)

    def finish(self, run: Any, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return read_outcome(run)

    def state_bytes(self, batch: Batch) -> int:
        slots = batch.inputs.layout.bucket.slots * len(batch.inputs.layout.sample) // self._programs.groups
        config = self._programs.config
        return slots * config.width * self._programs.dtype.itemsize * config.num_layers

    def release(self) -> None:
        self._states.clear()


def read_outcome(run: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Programs.outcome` returned, on the host and as `Scoring.finish` tells it."""
    sample, right, _, scored = (np.asarray(part) for part in run)
    return sample, right, scored


class Generating:
    """Greedy generation from the bare prompt: right when the text is one of the sample's answers."""

    def __init__(self, programs: Programs, decode_text: Callable[[Sequence[int]], str]):
        self._programs = programs
        self._decode_text = decode_text

    def first_layer(self, base: Plan, plan: Plan) -> int:
        return 0  # every plan is generated from its prompt

    def start(self, batch: Batch, base: Plan, plans: Sequence[Plan], blocks: Sequence[int]) -> Any:
        inputs, visual = self._programs.route((batch.inputs, self._programs.put(batch.visual)), blocks)
        return self._programs.generate(visual, inputs, plans)

    def finish(self, run: Any, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers, tokens, scored = (np.asarray(part) for part in run)
        right = np.zeros(len(numbers), bool)
        for row in np.flatnonzero(numbers != FILLER):
            text = self._decode_text(tokens[row].tolist()).strip()
            right[row] = text in samples[numbers[row]].answers
        return numbers, right, scored

    def state_bytes(self, batch: Batch) -> int:
        return 0  # nothing is kept

    def release(self) -> None:
        """Nothing is kept."""


class _BaseStates:
    """The inputs of the layers of one batch under one plan, made when they are first needed."""

    def __init__(self, programs: Programs, batch: Batch):
        self._programs = programs
        self._batch = batch
        self._plan = Plan()
        self._states = [programs.embed(batch.inputs.text_ids, batch.visual)]

    def at(self, plan: Plan, layer: int) -> States:
        """The states that enter `layer` under `plan`."""
        first = self._plan.lowest_difference(plan)
        if first is not None:
            del self._states[first + 1 :]
            self._plan = plan
        plans = [plan] * self._programs.groups
        while len(self._states) <= layer:
            last = len(self._states) - 1
            starts = [last] * self._programs.groups
            self._states.append(self._programs.layers(self._states[last], self._batch.inputs, plans, starts, last + 1))
        return self._states[layer]
