"""How a batch is evaluated under a plan: by teacher forcing, or by generating.

Teacher forcing starts a candidate from its base's stored states at the layer in which they differ. Every layer goes through
one compiled program, which makes that bit-equal to a run from the start.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from rlens_jax.models.decoder import TracedPlan
from rlens_jax.plan import Plan
from rlens_jax.ranking.inputs import Batch, Dataset
from rlens_jax.ranking.programs import Programs


@runtime_checkable
class Scoring(Protocol):
    """What the evaluator asks of an objective."""

    def start(self, batch: Batch, base: Plan, plan: Plan) -> Any:
        """Hand a batch to the device; returns what `finish` needs."""

    def finish(self, run: Any, dataset: Dataset, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Per row of the batch: is the answer right (bool), and were all probe scores numbers (bool)."""

    def state_bytes(self, batch: Batch) -> int:
        """Memory that the batch's base states take."""

    def release(self) -> None:
        """Forget all base states."""


class TeacherForcing:
    """One pass over prompt and answer: greedy decoding would give exactly these tokens if each is the argmax."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._states: dict[int, _BaseStates] = {}

    def start(self, batch: Batch, base: Plan, plan: Plan) -> tuple[Any, Any]:
        last = self._programs.config.num_layers
        difference = base.lowest_difference(plan)
        first = last - 1 if difference is None else difference
        x, before = self._states.setdefault(id(batch), _BaseStates(self._programs, batch)).at(base, first)
        x, scored = self._programs.layers(x, batch.inputs, traced_plan(plan, last), first, last)
        right, _ = self._programs.outcome(x, batch.inputs)
        return right, before & scored

    def finish(self, run: tuple[Any, Any], dataset: Dataset, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        right, scored = run
        return np.asarray(right), np.asarray(scored)

    def state_bytes(self, batch: Batch) -> int:
        return batch.embedded.nbytes * self._programs.config.num_layers

    def release(self) -> None:
        self._states.clear()


class Generating:
    """Greedy generation from the bare prompt: right when the text is one of the sample's answers."""

    def __init__(self, programs: Programs, decode_text: Callable[[Sequence[int]], str]):
        self._programs = programs
        self._decode_text = decode_text

    def start(self, batch: Batch, base: Plan, plan: Plan) -> tuple[Any, Any]:
        traced = traced_plan(plan, self._programs.config.num_layers)
        return self._programs.generate(batch.visual, batch.inputs, traced)

    def finish(self, run: tuple[Any, Any], dataset: Dataset, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        tokens, scored = (np.asarray(part) for part in run)
        texts = [self._decode_text(row.tolist()).strip() for row in tokens[: len(batch.samples)]]
        answers = [dataset.samples[sample].answers for sample in batch.samples]
        return np.array([text in allowed for text, allowed in zip(texts, answers, strict=True)]), scored

    def state_bytes(self, batch: Batch) -> int:
        return 0  # every plan is generated from its prompt, nothing is kept

    def release(self) -> None:
        """Nothing is kept."""


class _BaseStates:
    """The inputs of the layers of one batch under one plan, made when they are first needed."""

    def __init__(self, programs: Programs, batch: Batch):
        self._programs = programs
        self._batch = batch
        self._plan = Plan()
        self._states = [batch.embedded]
        self._scored: list[Any] = [jnp.ones(batch.embedded.shape[0], bool)]

    def at(self, plan: Plan, layer: int) -> tuple[Any, Any]:
        """The states that enter `layer` under `plan`, and whether all probe scores before were numbers."""
        first = self._plan.lowest_difference(plan)
        if first is not None:
            del self._states[first + 1 :], self._scored[first + 1 :]
            self._plan = plan
        traced = traced_plan(plan, self._programs.config.num_layers)
        while len(self._states) <= layer:
            last = len(self._states) - 1
            x, scored = self._programs.layers(self._states[last], self._batch.inputs, traced, last, last + 1)
            self._states.append(x)
            self._scored.append(self._scored[last] & scored)
        return self._states[layer], self._scored[layer]


def traced_plan(plan: Plan, num_layers: int) -> TracedPlan:
    """A plan as data on the device."""
    return TracedPlan(*(jnp.asarray(flags) for flags in plan.flags(num_layers)))
