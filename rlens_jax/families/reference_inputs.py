"""Model inputs of other frameworks, as parity bundles hold them, read into ours: the record and what all families share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from rlens_jax.errors import UserError
from rlens_jax.models.forward import FamilyConfig
from rlens_jax.models.prompt import PreparedImage, Prompt

ConfigT_contra = TypeVar("ConfigT_contra", bound=FamilyConfig, contravariant=True)

TEXT_NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Row:
    """One sample as our model reads it."""

    prompt: Prompt
    images: tuple[PreparedImage, ...]


@dataclass(frozen=True)
class ReferenceInputs(Generic[ConfigT_contra]):
    """Names and reader of a family's inputs."""

    image_names: tuple[str, ...]
    """Inputs besides `TEXT_NAMES`, by their names in Hugging Face's or the published code."""
    read_images: Callable[[str, Sequence[np.ndarray], Mapping[str, np.ndarray], ConfigT_contra], list[Row]]
    """`read_images(where, token_ids, tensors, config)`: token ids of each sample without padding, all input tensors, and the
    config of the model. Raises UserError, beginning with `where`, if the inputs do not fit each other or the model."""
    derived: Mapping[str, Callable[[Path, ConfigT_contra], np.ndarray]] = field(default_factory=dict)
    """Inputs that a bundle may leave out, and what they are for a model folder and its config."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs."""
        return (*TEXT_NAMES, *self.image_names)

    def read(self, where: str, tensors: Mapping[str, np.ndarray], config: ConfigT_contra, folder: Path) -> list[Row]:
        """Read all samples of a case for the model in `folder`.

        Raises:
            UserError: the inputs do not fit each other or the model; the error begins with `where`.
        """
        left_out = {name: derive(folder, config) for name, derive in self.derived.items() if name not in tensors}
        tensors = {**tensors, **left_out}
        return self.read_images(where, _token_ids(where, tensors, config.decoder.vocabulary), tensors, config)


def _token_ids(where: str, tensors: Mapping[str, np.ndarray], vocabulary: int) -> list[np.ndarray]:
    """The token ids of each sample, int [T_i], without padding."""
    if "input_ids" not in tensors:
        raise UserError(f"{where}: holds no input_ids")
    ids = tensors["input_ids"]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind != "i":
        raise UserError(f"{where}: input_ids has shape {list(ids.shape)}, expected whole numbers [B, T]")
    mask = tensors.get("attention_mask", np.ones_like(ids))
    if mask.shape != ids.shape:
        raise UserError(f"{where}: attention_mask has shape {list(mask.shape)}, expected {list(ids.shape)} as input_ids")
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(ids.shape[1])[None] < lengths[:, None]) or not lengths.all():
        raise UserError(f"{where}: attention_mask is not 1 ... 1 0 ... 0 in each row; bundles are right-padded")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(f"{where}: input_ids has tokens outside the model's vocabulary of {vocabulary}")
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def checked(where: str, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | str, ...]) -> np.ndarray:
    """An input of the expected shape, in which names stand for any size; empty if the bundle has no such input."""
    array = tensors.get(name)
    if array is None:
        return np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    fits = [isinstance(size, str) or size == actual for size, actual in zip(shape, array.shape, strict=False)]
    if array.ndim != len(shape) or not all(fits):
        expected = ", ".join(map(str, shape))
        raise UserError(f"{where}: {name} has shape {list(array.shape)}, expected [{expected}]")
    return array


def deal_images(
    where: str, masks: Sequence[np.ndarray], images: Sequence[PreparedImage], source: str, unit: str
) -> list[tuple[PreparedImage, ...]]:
    """Give each row as many of the images, in order, as its visual tokens need.

    `masks` are the visual tokens of each row, bool [T_i]; `images` those of all rows, one after another. Error messages name the
    input `source`, which holds the images, and their `unit`.
    """
    dealt, first = [], 0
    for number, mask in enumerate(masks):
        stop, missing = first, int(mask.sum())
        while missing > 0 and stop < len(images):
            missing -= images[stop].tokens.count
            stop += 1
        if missing:
            raise UserError(
                f"{where}: row {number} of input_ids has {int(mask.sum())} image tokens, to which its images do not add up"
            )
        dealt.append(tuple(images[first:stop]))
        first = stop
    if first != len(images):
        raise UserError(f"{where}: {source} has {len(images)} {unit}, input_ids has tokens for {first}")
    return dealt


def plain_rows(
    where: str,
    token_ids: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    images: Sequence[PreparedImage],
    source: str,
    unit: str,
) -> list[Row]:
    """Rows of plain rotary positions with their images; the arguments are those of `deal_images`."""
    dealt = deal_images(where, masks, images, source, unit)
    return [Row(Prompt.plain(ids, mask), taken) for ids, mask, taken in zip(token_ids, masks, dealt, strict=True)]


def zero_padded(array: np.ndarray, length: int) -> np.ndarray:
    """`array` followed by zeros up to `length` along its first axis."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])
