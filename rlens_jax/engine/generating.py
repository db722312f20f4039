"""How a batch is evaluated under plans by generating, and the texts that a model generates."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlens_jax.data.samples import Sample, normalised
from rlens_jax.engine.inputs import Split
from rlens_jax.engine.overflow import not_finite
from rlens_jax.engine.pools import Batch, Pool
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.scoring import BranchOutcomes
from rlens_jax.models.prompt import FILLER
from rlens_jax.plans import Plan


class Generating:
    """Greedy generation from the bare prompt: right if the text is one of the sample's answers. Stores no states."""

    def __init__(self, programs: Programs, decode_text: Callable[[Sequence[int]], str]):
        self.programs = programs
        self._decode_text = decode_text

    def hold(self, batches: Sequence[Batch]) -> None:
        pass

    def start(self, batch: Batch, base: Plan, plan: Plan) -> Any:
        return self.programs.generate(self.programs.put(batch.visual), batch.inputs, plan)

    def finish(self, run: Any, samples: Sequence[Sample]) -> BranchOutcomes:
        numbers, tokens, finite = (np.asarray(part) for part in run)
        right = np.zeros(numbers.shape, bool)
        for place in zip(*np.nonzero(numbers != FILLER), strict=True):
            text = normalised(self._decode_text(tokens[place].tolist()))
            right[place] = text in samples[numbers[place]].answers
        return BranchOutcomes(numbers, right, finite)

    def state_bytes(self, pool: Pool) -> int:
        return 0

    def release(self) -> None:
        pass


def generated_tokens(programs: Programs, split: Split, plan: Plan) -> list[list[int]]:
    """The greedy tokens of each sample of a split of bare prompts, on every process; after its end, an answer repeats it.

    Raises:
        UserError: numbers are not finite, naming sample and layer.
    """
    found: list[list[int]] = [[] for _ in split.samples]
    for batch in split.batches:
        numbers, tokens, finite = map(np.asarray, programs.generate(programs.put(batch.visual), batch.inputs, plan))
        for place in zip(*np.nonzero(numbers != FILLER), strict=True):
            number = int(numbers[place])
            if not finite[place]:
                raise not_finite(programs, batch, number, split.samples[number].id, plan, programs.reduction)
            found[number] = tokens[place].tolist()
    return found


def generated_texts(programs: Programs, split: Split, plan: Plan, decode_text: Callable[[Sequence[int]], str]) -> list[str]:
    """The greedy answer to each sample of a split of bare prompts, on every process; errors as of `generated_tokens`."""
    return [normalised(decode_text(tokens)) for tokens in generated_tokens(programs, split, plan)]
