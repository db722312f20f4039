"""Which prompts share a row: those about the same images, as branches of the tokens that they all begin with.

What a causal decoder computes for an image does not depend on the text after it. So the images of a row are computed once for all
of its prompts.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rlens_jax.engine.dealing import share_trunk
from rlens_jax.models.prompt import Branches, Prompt


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts of a sample: one per reference answer, or the bare one."""

    sample: int
    """Number of the sample in the split."""
    images: Hashable
    """Equal for images with equal contents that are read in the same way; an empty tuple without images."""
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Row:
    """Prompts that share a row, and the number of each one's sample in the split."""

    branches: Branches
    samples: tuple[int, ...]
    seed: int
    """Seed of random probes: the number of the first sample with this trunk, in the same row or not."""


def rows_of(
    asked: Sequence[SamplePrompts], *, sharing: bool = True, most_text: int | None = None, most_branches: int | None = None
) -> list[Row]:
    """Rows that hold all prompts, ordered by the first sample of their trunk, and those of a trunk by sample.

    Samples share a trunk if their images are the same, and all tokens up to the last visual one. Samples without images have a
    trunk each. A row takes samples as `dealing.share_trunk` says.

    Args:
        asked: in the order of the samples.
        sharing: whether prompts share rows; otherwise each has its own.
        most_text: text tokens that a row can hold.
        most_branches: prompts that a row can hold, where each sample has one.
    """
    groups: dict[Hashable, list[SamplePrompts]] = defaultdict(list)
    for sample in asked:
        first = sample.prompts[0]
        images_end = int(np.flatnonzero(first.is_visual)[-1]) + 1 if first.num_visual else 0
        alike = (sample.images, first.token_ids[:images_end].tobytes()) if images_end else sample.sample
        groups[alike].append(sample)
    rows = []
    for members in groups.values():
        seed = members[0].sample
        if not sharing:
            rows += [Row(Branches.alone(p), (each.sample,), seed) for each in members for p in each.prompts]
            continue
        trunk = _common_length([prompt for each in members for prompt in each.prompts])
        tokens = [sum(len(prompt.token_ids) - trunk for prompt in each.prompts) for each in members]
        room = None if most_text is None else most_text - (trunk - members[0].prompts[0].num_visual)
        for part in _at_most(share_trunk(trunk, tokens, room), most_branches):
            mine = [(each.sample, prompt) for each in members[part.start : part.stop] for prompt in each.prompts]
            numbers, prompts = zip(*mine, strict=True)
            rows.append(Row(Branches(prompts, trunk), numbers, seed))
    return rows


def _common_length(prompts: Sequence[Prompt]) -> int:
    """The number of tokens that all prompts begin with, their answers not among them."""
    shortest = min(len(prompt.token_ids) - prompt.answer_length for prompt in prompts)
    ids = np.stack([prompt.token_ids[:shortest] for prompt in prompts])
    differs = np.flatnonzero((ids != ids[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest


def _at_most(parts: Sequence[range], most: int | None) -> list[range]:
    """Ranges cut into pieces of about equal length, of at most `most` numbers."""
    pieces = []
    for part in parts:
        count = 1 if most is None else -(-len(part) // most)
        pieces += [part[len(part) * piece // count : len(part) * (piece + 1) // count] for piece in range(count)]
    return pieces
