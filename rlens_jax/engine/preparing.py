"""Samples before anything is compiled: prompts as token ids, and the sizes of all rows and images, from which buckets are chosen.

Each process prepares its own samples. All learn the sizes of all samples.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.engine.buckets import Size
from rlens_jax.models.prompt import ImageSize, PreparedImage, Preparer, Prompt

Gather = Callable[[Any], list[Any]]
"""Every process's value, in the order of the processes."""

KEPT_BYTES = 1_000_000_000
"""Memory for the prepared images of a split that are kept between measuring and encoding (our decision)."""


class Images:
    """The prepared images of samples, which are measured first and encoded later.

    Images are kept in between while they fit into `KEPT_BYTES`; the others are prepared twice. The patches of a large data set
    do not fit into memory, and only preparing tells a size for certain: each family's processor has rules of its own.
    """

    def __init__(self, samples: Sequence[Sample], preparer: Preparer):
        self._samples, self._preparer = samples, preparer
        self._kept: dict[int, Sequence[PreparedImage]] = {}
        self._room = KEPT_BYTES

    def measure(self, number: int) -> Sequence[PreparedImage]:
        """The images of a sample. UserError if one cannot be used."""
        images = self._prepared(number)
        needed = sum(array.nbytes for image in images for array in image.arrays)
        if needed <= self._room:
            self._kept[number] = images
            self._room -= needed
        return images

    def take(self, number: int) -> Sequence[PreparedImage]:
        """The images of a sample, for the last time."""
        return self._kept.pop(number, None) or self._prepared(number)

    def _prepared(self, number: int) -> Sequence[PreparedImage]:
        sample = self._samples[number]
        return self._preparer.images(load_images(sample, self._preparer.transparency), sample.id)


@dataclass(frozen=True)
class Row:
    """A prompt, and the number of its sample in the split."""

    sample: int
    prompt: Prompt


@dataclass(frozen=True)
class SampleSizes:
    """What buckets must hold of one sample."""

    rows: tuple[Size, ...]
    """Text and visual tokens of each row."""
    images: tuple[ImageSize, ...]
    answer: int
    """Tokens of the longest answer, with the end of the turn."""


@dataclass(frozen=True)
class PreparedSplit:
    """The samples of a split, prepared: this process's rows and images, and the sizes of all samples."""

    samples: tuple[Sample, ...]
    own: range
    """The samples of this process."""
    rows: tuple[Row, ...]
    images: Images
    sizes: tuple[SampleSizes, ...]

    @property
    def num_tokens(self) -> np.ndarray:
        """int [samples, 2]: text and visual tokens of each sample's longest row."""
        return np.array([np.max(sizes.rows, axis=0) for sizes in self.sizes]).reshape(-1, 2)

    @property
    def row_sizes(self) -> Counter[Size]:
        """How often a row has each size."""
        return Counter(size for sizes in self.sizes for size in sizes.rows)

    @property
    def image_sizes(self) -> Counter[ImageSize]:
        """How often an image has each size."""
        return Counter(size for sizes in self.sizes for size in sizes.images)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, 0 without answers."""
        return max((sizes.answer for sizes in self.sizes), default=0)


def prepare(
    samples: Sequence[Sample],
    preparer: Preparer,
    own: range,
    with_answers: bool,
    gather: Gather,
    advance: Callable[[], None] = lambda: None,
) -> PreparedSplit:
    """Prepare this process's samples and measure all; every process calls it with the same samples.

    Args:
        own: this process's samples, by number. Together the processes have all.
        with_answers: one row per reference answer, for teacher forcing; else one bare prompt per sample.
        advance: called after each sample.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    images, rows, measured = Images(samples, preparer), [], []
    for number in own:
        sample, prepared = samples[number], images.measure(number)
        tokens = [image.tokens for image in prepared]
        prompts = [preparer.prompt(sample, tokens, answer) for answer in (sample.answers if with_answers else (None,))]
        rows += [Row(number, prompt) for prompt in prompts]
        sizes = [[prompt.num_text, prompt.num_visual] for prompt in prompts]
        measured.append([number, sizes, [image.size for image in prepared], max(prompt.answer_length for prompt in prompts)])
        advance()
    known = {number: (sizes, leading, answer) for process in gather(measured) for number, sizes, leading, answer in process}
    all_sizes = (known[number] for number in range(len(samples)))
    return PreparedSplit(
        tuple(samples),
        own,
        tuple(rows),
        images,
        tuple(SampleSizes(tuple(map(tuple, sizes)), tuple(map(tuple, leading)), answer) for sizes, leading, answer in all_sizes),
    )
