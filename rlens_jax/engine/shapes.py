"""The static shapes of a run: buckets of rows and of images, as configured or chosen from the data."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlens_jax.config import ComputeConfig
from rlens_jax.engine.buckets import ENOUGH, Size, choose_buckets, padding, smallest
from rlens_jax.engine.preparing import PreparedSplit, SampleSizes
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket, smallest_bucket
from rlens_jax.models.prompt import ImageArrays, ImageSize

MAX_ROWS = 16
"""Max rows of a work group in a batch (our decision): more rows of long prompts are not faster and leave more padding."""
NAMED = 10
"""Samples that an error message names."""


def row_slots(sizes: np.ndarray) -> np.ndarray:
    """Slots of rows: text and visual slots together."""
    return sizes.sum(axis=-1)


def image_slots(sizes: np.ndarray) -> np.ndarray:
    """Slots of images: the patches of all views."""
    return sizes.prod(axis=-1)


def slot_sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """Bucket sizes 2^k and 3/2 2^k from `smallest` to `largest`: each wastes at most a third of its slots."""
    sizes = [smallest]
    while sizes[-1] < largest:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(power * 3 // 2 if sizes[-1] == power else power * 2)
    return (*sizes[:-1], largest)


def row_buckets(text_slots: Sequence[int], visual_slots: Sequence[int]) -> tuple[Bucket, ...]:
    """Every pair of bucket sizes."""
    return tuple(itertools.starmap(Bucket, itertools.product(text_slots, visual_slots)))


@dataclass(frozen=True)
class Shapes:
    """Buckets, and rows per batch of one work group."""

    rows: tuple[Bucket, ...]
    images: tuple[ImageSize, ...]
    arrays_of: Callable[[ImageSize], ImageArrays]
    """The arrays of an image that is padded to a bucket."""
    batch_size: int

    def row(self, size: Size) -> Bucket:
        """The bucket with the fewest slots for a row; one must hold it."""
        bucket = smallest((bucket.size for bucket in self.rows), size, row_slots)
        assert bucket is not None, size
        return Bucket(*bucket)

    def image(self, size: ImageSize) -> ImageSize:
        """The smallest bucket that holds an image. An image that is larger than all has its own."""
        return smallest(self.images, size, image_slots) or size

    @property
    def identity(self) -> dict[str, str]:
        """The buckets in words: rounding may differ from one shape to another, so a journal belongs to them."""
        return {
            "rows": ", ".join(f"{bucket.text} + {bucket.visual}" for bucket in self.rows),
            "images": ", ".join(" x ".join(map(str, size)) for size in self.images),
        }

    @property
    def largest(self) -> Bucket:
        """The bucket with the most slots."""
        return max(self.rows, key=lambda bucket: (bucket.slots, bucket.visual))


def choose_shapes(compute: ComputeConfig, kind: ModelKind, splits: Sequence[PreparedSplit]) -> Shapes:
    """The buckets that the rows and images of a run use: configured ones, or those that pad the given data least.

    Raises:
        UserError: samples that do not fit into the model's context or into configured buckets, in one message.
    """
    context = kind.config.decoder.context
    check_context(splits, context, 0, "leave them out or make their images smaller")
    rows = tuple(Bucket(*size) for size in _row_buckets(compute, splits))
    return Shapes(rows, _image_buckets(compute, kind, splits), kind.image_arrays, compute.batch_size)


def check_context(splits: Iterable[PreparedSplit], context: int, new_tokens: int, remedy: str) -> None:
    """UserError, naming them, if samples with their new tokens are longer than the model's context; `remedy` says what to do."""
    new = f" with {new_tokens} new ones" if new_tokens else ""
    what = f"tokens: the model's context{new} is {context}"
    _check(splits, lambda sizes: max(map(sum, sizes.rows)), context - new_tokens, what, remedy)


def useful_rows(shapes: Shapes, splits: Sequence[PreparedSplit], processes: int) -> int:
    """The most rows per batch of a work group that leave few of its rows without a sample: a share below `ENOUGH`, or one row.

    Each of the `processes` fills batches with an equal share of the rows.
    """
    counts = [
        (bucket.slots, -(-number // processes))
        for split in splits
        for bucket, number in Counter(map(shapes.row, split.row_sizes.elements())).items()
    ]
    filled = sum(slots * number for slots, number in counts)

    def empty(rows: int) -> float:
        return 1 - filled / sum(slots * -(-number // rows) * rows for slots, number in counts)

    return next(
        rows for rows in (1 << power for power in range(MAX_ROWS.bit_length() - 1, -1, -1)) if rows == 1 or empty(rows) < ENOUGH
    )


def row_padding(shapes: Shapes, splits: Iterable[PreparedSplit]) -> float:
    """The share of the slots of all rows that is padding."""
    return padding(_total(split.row_sizes for split in splits), [bucket.size for bucket in shapes.rows], row_slots)


def image_padding(shapes: Shapes, splits: Iterable[PreparedSplit]) -> float:
    """The share of the patches of all images that is padding."""
    return padding(_total(split.image_sizes for split in splits), shapes.images, image_slots)


def _row_buckets(compute: ComputeConfig, splits: Sequence[PreparedSplit]) -> Sequence[Size]:
    """Counts with configured slots are padded to these first; `choose_buckets` chooses the rest."""
    configured = compute.text_slots, compute.visual_slots
    for axis, (kind, slots) in enumerate(zip(("text", "visual"), configured, strict=True)):
        if slots is not None:
            what = f"{kind} tokens; the largest bucket has {slots[-1]}"
            remedy = f"add a larger one to compute.{kind}_slots, or set it to null"
            _check(splits, partial(_longest, axis), slots[-1], what, remedy)
    sizes: Counter[Size] = Counter()
    for size, count in _total(split.row_sizes for split in splits).items():
        sizes[tuple(_padded(number, slots) for number, slots in zip(size, configured, strict=True))] += count
    if None not in configured:
        return sorted(sizes)
    return choose_buckets(sizes, compute.max_buckets, row_slots, [slots is None for slots in configured]).buckets


def _image_buckets(compute: ComputeConfig, kind: ModelKind, splits: Sequence[PreparedSplit]) -> tuple[ImageSize, ...]:
    sizes = _total(split.image_sizes for split in splits)
    if not sizes:
        return ()
    if compute.patch_slots is None:
        # Views are few: rounding up their number costs much.
        may_round = [*(len(next(iter(sizes))) - 1) * [False], True]
        return choose_buckets(sizes, compute.max_buckets, image_slots, may_round).buckets
    buckets = kind.image_sizes(compute.patch_slots)
    fitting = {size: smallest(buckets, size, image_slots) for size in sizes}

    def most(sample: SampleSizes) -> int:
        return max((math.prod(size) for size in sample.images if fitting[size] is None), default=0)

    what = f"patches of an image; the largest bucket has {compute.patch_slots[-1]}"
    _check(splits, most, 0, what, "add a larger one to compute.patch_slots, or set it to null")
    return tuple(sorted({bucket for bucket in fitting.values() if bucket is not None}))


def _longest(axis: int, sizes: SampleSizes) -> int:
    return max(size[axis] for size in sizes.rows)


def _total(counters: Iterable[Counter[Size]]) -> Counter[Size]:
    return sum(counters, Counter())


def _padded(number: int, slots: Sequence[int] | None) -> int:
    bucket = None if slots is None else smallest_bucket(slots, number)
    return number if bucket is None else bucket


def _check(splits: Iterable[PreparedSplit], count: Callable[[SampleSizes], int], limit: int, what: str, remedy: str) -> None:
    """UserError that names the samples with a count above the limit: the first `NAMED`, and how many there are."""
    found = [(sample.id, count(sizes)) for split in splits for sample, sizes in zip(split.samples, split.sizes, strict=True)]
    wrong = [f"{name}: {number}" for name, number in found if number > limit]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{len(wrong)} of {len(found)} samples have too many {what} ({', '.join(wrong[:NAMED])}{more}); {remedy}")
