"""The static shapes of a run: buckets of rows and of images, as configured or chosen from the data."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rlens_jax.config import ComputeConfig
from rlens_jax.engine.buckets import Size, choose_buckets, padding, smallest
from rlens_jax.engine.dealing import TOKENS_PER_BLOCK, deal, fill_buckets, rows_per_block
from rlens_jax.engine.preparing import PreparedSplit
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket, smallest_bucket
from rlens_jax.models.prompt import ImageArrays, ImageSize, Places

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
    """Buckets, and rows of the largest one that a work group computes together."""

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
    _check(splits, lambda split, number: sum(split.sizes[number].prompt), context - new_tokens, what, remedy)


def useful_rows(shapes: Shapes) -> int:
    """The most rows of the largest bucket that a work group computes together with profit."""
    return max(1, TOKENS_PER_BLOCK // shapes.largest.slots)


Dealt = Mapping[Bucket, Sequence[Sequence[int]]]
"""The rows of each work group in each bucket, by number."""


def dealt_rows(split: PreparedSplit, shapes: Shapes, groups: int) -> Dealt:
    """The buckets of all rows of a split, and the work groups that compute them; in order in each group.

    Groups get about equally many patches of images, which each of them encodes for itself.
    """
    buckets = [bucket.size for bucket in shapes.rows]
    numbers = fill_buckets([row.size for row in split.rows], buckets, row_slots, groups)
    images = [split.image_sizes_of[split.image_groups[row.samples[0]]] for row in split.rows]
    costs = [float(sum(map(math.prod, sizes))) for sizes in images]
    dealt = deal(costs, numbers, groups)
    return {
        shapes.rows[number]: [sorted(row for row in mine if numbers[row] == number) for mine in dealt]
        for number in sorted(set(numbers))
    }


@dataclass(frozen=True)
class Block:
    """What of a bucket a work group computes together: static shapes, in addition to the bucket."""

    rows: int
    places: Places


def blocks_of(splits: Iterable[tuple[PreparedSplit, Dealt]], shapes: Shapes, *, even: bool) -> dict[Bucket, Block]:
    """The block of each bucket, the same in all splits, because each is compiled. Branches and answers are powers of two.

    Args:
        even: rows by a budget of slots, in blocks that are filled evenly; else at most the batch size of `shapes`.
    """
    fullest: Counter[Bucket] = Counter()
    branches: Counter[Bucket] = Counter()
    answers: Counter[Bucket] = Counter()
    leading: Counter[Bucket] = Counter()
    for split, dealt in splits:
        for bucket, groups in dealt.items():
            members = [split.rows[number] for group in groups for number in group]
            fullest[bucket] = max(fullest[bucket], *map(len, groups))
            branches[bucket] = max(branches[bucket], *(len(row.samples) for row in members))
            answers[bucket] = max(answers[bucket], *(row.answers for row in members))
            leading[bucket] = max(leading[bucket], *(row.leading_text for row in members))
    budget = shapes.batch_size * shapes.largest.slots
    return {
        bucket: Block(
            rows_per_block(bucket.slots, most, budget) if even else min(shapes.batch_size, power_of_two(most)),
            Places(power_of_two(branches[bucket]), power_of_two(answers[bucket]), slots_before_visual(leading[bucket])),
        )
        for bucket, most in fullest.items()
    }


def slots_before_visual(tokens: int) -> int:
    """`Places.leading_text` of rows with at most so many text tokens before a visual one: few numbers, so few programs."""
    return -(-tokens // 8) * 8


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


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
            _check(splits, partial(_needed, axis), slots[-1], what, remedy)
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

    def most(split: PreparedSplit, number: int) -> int:
        own = split.image_sizes_of[split.image_groups[number]]
        return max((math.prod(size) for size in own if fitting[size] is None), default=0)

    what = f"patches of an image; the largest bucket has {compute.patch_slots[-1]}"
    _check(splits, most, 0, what, "add a larger one to compute.patch_slots, or set it to null")
    return tuple(sorted({bucket for bucket in fitting.values() if bucket is not None}))


def _needed(axis: int, split: PreparedSplit, number: int) -> int:
    """Text or visual slots of a row that holds a sample."""
    sizes = split.sizes[number]
    return (sizes.row_text, sizes.prompt[1])[axis]


def _total(counters: Iterable[Counter[Size]]) -> Counter[Size]:
    return sum(counters, Counter())


def _padded(number: int, slots: Sequence[int] | None) -> int:
    bucket = None if slots is None else smallest_bucket(slots, number)
    return number if bucket is None else bucket


def _check(
    splits: Iterable[PreparedSplit], count: Callable[[PreparedSplit, int], int], limit: int, what: str, remedy: str
) -> None:
    """UserError that names the samples with a count above the limit: the first `NAMED`, and how many there are."""
    found = [(sample.id, count(split, number)) for split in splits for number, sample in enumerate(split.samples)]
    wrong = [f"{name}: {number}" for name, number in found if number > limit]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{len(wrong)} of {len(found)} samples have too many {what} ({', '.join(wrong[:NAMED])}{more}); {remedy}")
