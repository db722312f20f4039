"""Samples before anything is compiled: prompts as token ids in rows, and the sizes of all rows and images, for which buckets are
chosen.

Each process prepares a share of the images with all prompts about them. All learn the sizes of all.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image, Resampling

from rlens_jax.data.images import images_key, load_images
from rlens_jax.data.samples import Sample
from rlens_jax.engine.buckets import Size
from rlens_jax.engine.trunks import Row, SamplePrompts, rows_of
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import Branches, Grid, ImageSize, ImageTokens, Measure, PreparedImage, Preparer, Prompt

KEPT_BYTES = 1_000_000_000
"""Memory for the prepared images of a split that are kept between measuring and encoding (our decision)."""


def image_groups(samples: Sequence[Sample]) -> list[int]:
    """For each sample, the number of the first one with the same images: equal contents, read in the same way.

    A sample without images has its own number. UserError, naming the sample, if an image cannot be read.
    """
    first: dict[Hashable, int] = {}
    known: dict[Hashable, Hashable] = {}  # a file that many questions name is read once
    groups = []
    for number, sample in enumerate(samples):
        named = sample.images, sample.as_stored
        if named not in known:
            known[named] = images_key(sample)
        groups.append(first.setdefault(known[named] if sample.images else number, number))
    return groups


Resize = Callable[[Image], Image]


def as_it_is(image: Image) -> Image:
    """The image itself."""
    return image


class Images:
    """The prepared images of samples, which are measured first and encoded later.

    Images are kept in between while they fit into `KEPT_BYTES`; the others are prepared twice. The patches of a large data set
    do not fit into memory, and only preparing tells a size for certain: each family's processor has rules of its own.
    """

    def __init__(self, samples: Sequence[Sample], preparer: Preparer, resized: Resize = as_it_is):
        self._samples, self._preparer, self._resized = samples, preparer, resized
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
        return self._preparer.images(list(map(self._resized, load_images(sample, self._preparer.transparency))), sample.id)


def share_reached(share: float, measure: Measure, sizes: Sequence[Grid]) -> tuple[int, int]:
    """Visual tokens of images of these widths and heights, down-sampled to a share, and as they are."""
    return sum(_smaller(share, measure, *size)[1] for size in sizes), sum(measure(*size)[1].count for size in sizes)


def down_sampled(share: float, measure: Measure, image: Image) -> Image:
    """The image at the largest of some sizes at which it has at most a share of its visual tokens, by bicubic antialiasing.

    The family's own rule, `measure`, says how many it has at a size. If that rule lets it have no fewer than more than the share,
    it has the fewest possible.
    """
    size, _ = _smaller(share, measure, *image.size)
    return image if size == image.size else image.resize(size, Resampling.BICUBIC)


def _smaller(share: float, measure: Measure, width: int, height: int) -> tuple[Grid, int]:
    """The size to which `down_sampled` brings an image, and the number of its visual tokens there."""
    heights = dict.fromkeys(max(1, round(height * 2 ** (-step / 16))) for step in range(65))
    sizes = [(max(1, width * smaller // height), smaller) for smaller in heights]  # no size is longer than the image
    counts = [measure(*size)[1].count for size in sizes]
    wanted = max(share * counts[0], min(counts))
    return next(pair for pair in zip(sizes, counts, strict=True) if pair[1] <= wanted)


@dataclass(frozen=True)
class RowSizes:
    """A row as all processes know it."""

    samples: tuple[int, ...]
    """The number of each branch's sample in the split."""
    text: int
    visual: int
    answers: int
    """Answer tokens of all branches."""
    leading_text: int
    """Text tokens before the last visual one."""

    @property
    def size(self) -> Size:
        """Text and visual tokens."""
        return self.text, self.visual


@dataclass(frozen=True)
class SampleSizes:
    """What must hold a sample that has a row of its own."""

    prompt: Size
    """Text and visual tokens of its longest prompt."""
    row_text: int
    """Text tokens of the shortest row that can hold it."""


@dataclass(frozen=True)
class PreparedSplit:
    """The samples of a split, prepared: the sizes of all, and the rows and images on demand."""

    samples: tuple[Sample, ...]
    image_groups: np.ndarray
    """int [samples], as `image_groups`."""
    rows: tuple[RowSizes, ...]
    sizes: tuple[SampleSizes, ...]
    image_sizes_of: dict[int, tuple[ImageSize, ...]]
    """The sizes of the images of each group."""
    images: Images
    """By the number of a group."""
    row: Callable[[int], Row]
    """The row with this number in `rows`."""

    @property
    def num_tokens(self) -> np.ndarray:
        """int [samples, 2]: text and visual tokens of each sample's longest prompt."""
        return np.array([sizes.prompt for sizes in self.sizes]).reshape(-1, 2)

    @property
    def row_sizes(self) -> Counter[Size]:
        """How often a row has each size."""
        return Counter(row.size for row in self.rows)

    @property
    def image_sizes(self) -> Counter[ImageSize]:
        """How often an image has each size."""
        return Counter(size for sizes in self.image_sizes_of.values() for size in sizes)

    def described(self) -> str:
        """How many questions an image has, in one line."""
        asked = [group for group, sample in zip(self.image_groups.tolist(), self.samples, strict=True) if sample.images]
        images = len(set(asked))
        text = f"{len(self.samples)} questions about {images} images in {len(self.rows)} rows"
        alone = len(self.rows) >= len(self.samples) > 1 and images < len(asked)
        return f"{text}; nothing is shared, because no prompts about an image are equal up to its end" if alone else text


def prepare(
    samples: Sequence[Sample],
    preparer: Preparer,
    with_answers: bool,
    processes: Processes,
    advance: Callable[[int], None] = lambda number: None,
    *,
    sharing: bool = True,
    most_text: int | None = None,
    most_branches: int | None = None,
    resized: Resize = as_it_is,
) -> PreparedSplit:
    """Prepare this process's share of the samples and measure all; every process calls it with the same samples.

    Args:
        with_answers: one prompt per reference answer, for teacher forcing; else one bare prompt per sample.
        advance: called with the number of samples that were prepared.
        sharing, most_text, most_branches: as of `rows_of`.
        resized: what the preparer gets in place of an image.

    Raises:
        UserError: an image or a prompt that cannot be used, naming the sample.
    """
    groups, images = image_groups(samples), Images(samples, preparer, resized)
    members: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)

    def rows_about(group: int, tokens: Sequence[ImageTokens]) -> tuple[list[SamplePrompts], list[Row]]:
        asked = []
        for number in members[group]:
            prompts = prompts_of(samples[number], tokens, preparer, with_answers)
            asked.append(SamplePrompts(number, (group,) if tokens else (), prompts))
        return asked, rows_of(asked, sharing=sharing, most_text=most_text, most_branches=most_branches)

    known: dict[int, list[Row]] = {}
    measured = []
    for group in [*members][processes.index :: processes.count]:
        prepared = images.measure(group)
        asked, known[group] = rows_about(group, [image.tokens for image in prepared])
        sizes = [[each.sample, _longest(each.prompts), _row_text(each, sharing)] for each in asked]
        rows = [[row.samples, *_counts(row.branches)] for row in known[group]]
        tokens = [[image.tokens.count, image.tokens.grid] for image in prepared]
        measured.append([group, sizes, rows, [image.size for image in prepared], tokens])
        advance(len(asked))
    everything = sorted((each for process in processes.gather(measured) for each in process), key=lambda each: each[0])
    places = [(group, place) for group, _, rows, *_ in everything for place in range(len(rows))]
    tokens_of = {group: [ImageTokens(n, tuple(grid)) for n, grid in tokens] for group, *_, tokens in everything}

    def row(number: int) -> Row:
        group, place = places[number]
        return (known[group] if group in known else rows_about(group, tokens_of[group])[1])[place]

    by_sample = {number: SampleSizes(tuple(size), text) for _, sizes, *_ in everything for number, size, text in sizes}
    return PreparedSplit(
        tuple(samples),
        np.array(groups, int),
        tuple(RowSizes(tuple(numbers), *counts) for _, _, rows, *_ in everything for numbers, *counts in rows),
        tuple(by_sample[number] for number in range(len(samples))),
        {group: tuple(map(tuple, sizes)) for group, _, _, sizes, _ in everything},
        images,
        row,
    )


def prompts_of(sample: Sample, tokens: Sequence[ImageTokens], preparer: Preparer, with_answers: bool) -> tuple[Prompt, ...]:
    """One prompt per reference answer, or one with the dense model's own answer; or only the bare prompt."""
    if with_answers and sample.own is None:
        return tuple(preparer.prompt(sample, tokens, answer) for answer in sample.answers)
    bare = preparer.prompt(sample, tokens, None)
    return (bare.answered(sample.own) if with_answers and sample.own is not None else bare,)


def _counts(row: Branches) -> Any:
    """The fields of `RowSizes` after the first."""
    return row.num_text, row.num_visual, row.num_answers, row.tokens.leading_text


def _longest(prompts: Sequence[Prompt]) -> Any:
    return max(prompt.num_text for prompt in prompts), prompts[0].num_visual


def _row_text(asked: SamplePrompts, sharing: bool) -> int:
    """Text tokens of the shortest row that holds a sample; without `sharing`, of the longest of its rows."""
    return max(row.branches.num_text for row in rows_of([asked], sharing=sharing))
