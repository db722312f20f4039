"""A few held-out samples, and what the model answers to them under a plan, for people to look at."""

from collections.abc import Callable, Sequence

import numpy as np

from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import FILLER, Split
from rlens_jax.engine.programs import Programs
from rlens_jax.plan import Plan

MOST = 6
"""How many samples are shown."""


def examples_of(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of all datasets in turn, the first of each first."""
    by_dataset: dict[str, list[Sample]] = {}
    for sample in samples:
        by_dataset.setdefault(sample.dataset, []).append(sample)
    rounds = max(map(len, by_dataset.values()))
    in_turn = [members[i] for i in range(rounds) for members in by_dataset.values() if i < len(members)]
    return in_turn[:MOST]


def generated_answers(
    programs: Programs, split: Split, plan: Plan, decode_text: Callable[[Sequence[int]], str]
) -> list[str]:
    """The greedy answer to each sample of a split of bare prompts, on every process."""
    texts = [""] * len(split.samples)
    for batch in split.batches:
        plans = [plan] * programs.groups
        numbers, tokens, _ = programs.generate(programs.put(batch.visual), batch.inputs, plans)
        for number, row in zip(np.asarray(numbers).tolist(), np.asarray(tokens).tolist(), strict=True):
            if number != FILLER:
                texts[number] = decode_text(row).strip()
    return texts
