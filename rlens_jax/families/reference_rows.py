"""What every family's inputs become: samples as our model reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.models.prompt import PreparedImage, Prompt

TEXT_NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Row:
    """One sample as our model reads it."""

    prompt: Prompt
    images: tuple[PreparedImage, ...]


@dataclass(frozen=True)
class FamilyInputs:
    """How a family's inputs are called, and read."""

    names: tuple[str, ...]
    """Beside `TEXT_NAMES`, Hugging Face's own."""
    read: Callable[[str, Sequence[np.ndarray], Mapping[str, np.ndarray], Any], list[Row]]
    """`read(where, token_ids, tensors, config)`: token ids of each sample without padding, all input tensors, and the
    family's config; UserError, which begins with `where`, when they do not fit each other or the model."""


def checked(where: str, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | str, ...]) -> np.ndarray:
    """An input of this shape, letters standing for any size; without it, as when there are no images, an empty one."""
    array = tensors.get(name)
    if array is None:
        return np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    fits = [isinstance(size, str) or size == given for size, given in zip(shape, array.shape, strict=False)]
    if array.ndim != len(shape) or not all(fits):
        expected = ", ".join(map(str, shape))
        raise UserError(f"{where}: {name} has shape {list(array.shape)}, expected [{expected}]")
    return array


def take_images(
    where: str, number: int, missing: int, images: Sequence[PreparedImage], first: int
) -> tuple[PreparedImage, ...]:
    """The next images, from `first` on, that make up the `missing` visual tokens of sample `number`."""
    taken, left = first, missing
    while left > 0 and taken < len(images):
        left -= images[taken].num_tokens
        taken += 1
    if left:
        raise UserError(
            f"{where}: row {number} of input_ids has {missing} image tokens, to which its images do not add up"
        )
    return tuple(images[first:taken])


def plain_prompt(ids: np.ndarray, is_visual: np.ndarray) -> Prompt:
    """A prompt whose tokens have rotary positions 0, 1, 2, ..."""
    positions = np.arange(len(ids), dtype=np.int32)[None]
    return Prompt(ids.astype(np.int32), is_visual, positions, len(ids), 0)


def padded(array: np.ndarray, length: int) -> np.ndarray:
    """`array` with zeros after it, `length` in all."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])
