"""A sample before the decoder reads it: prepared images, prompts of token ids with rotary positions, and batches of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from PIL.Image import Image

from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.layout import Bucket, TokenLayout, pack_layout, pack_rows
from rlens_jax.models.chat import Chat
from rlens_jax.pytrees import pytree

IGNORE = -1
"""Target of a slot that is not followed by an answer token."""

Grid = tuple[int, int]

ImageSize = tuple[int, ...]
"""The counts of an image that its arrays have as leading axes: patches, or views and patches of each view."""

ImageArrays = Sequence[tuple[tuple[int, ...], DTypeLike]]
"""Shape and dtype of each array of a prepared image."""


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image, as far as its prompt depends on them."""

    count: int
    grid: Grid = (0, 0)
    """For Qwen2-VL: rows and columns of patches. For MiniCPM-V: columns and rows of slices, 0 without slices."""


Measure = Callable[[int, int], tuple[ImageSize, ImageTokens]]
"""Size and tokens of a prepared image, from its width and height in pixels; it is alone in its prompt."""


@dataclass(frozen=True)
class PreparedImage:
    """The input of a vision tower for one image, without padding."""

    arrays: tuple[np.ndarray, ...]
    """The patches are the first array; zeros at the end of any axis are padding to the tower."""
    tokens: ImageTokens

    @property
    def size(self) -> ImageSize:
        """The leading axes of the patches."""
        return self.arrays[0].shape[:-1]


@dataclass(frozen=True)
class Prompt:
    """One token sequence of a sample: its prompt, or its prompt with a reference answer and the end-of-turn token."""

    token_ids: np.ndarray
    """int32 [T_i]; image tokens hold the placeholder of the family."""
    is_visual: np.ndarray
    """bool [T_i]."""
    rope_positions: np.ndarray
    """int32 [axes, T_i]."""
    next_rope: int
    """Rotary position of the next token, the same on all axes."""
    answer_length: int
    """Number of tokens at the end that are the answer and the end of the turn; 0 without an answer."""

    @classmethod
    def plain(cls, token_ids: np.ndarray, is_visual: np.ndarray, answer_length: int = 0) -> "Prompt":
        """A prompt whose tokens have rotary positions 0, 1, 2, ..."""
        positions = np.arange(len(token_ids), dtype=np.int32)[None]
        return cls(token_ids.astype(np.int32), is_visual, positions, len(token_ids), answer_length)

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())

    @property
    def num_text(self) -> int:
        return len(self.is_visual) - self.num_visual


@runtime_checkable
class Preparer(Protocol):
    """Turns images and texts into model inputs as one model family does."""

    @property
    def chat(self) -> Chat:
        """Tokenizer and chat template of the model folder."""

    @property
    def transparency(self) -> Transparency:
        """What becomes of transparent pixels before `images`."""

    def images(self, pixels: Sequence[Image], sample_id: str) -> Sequence[PreparedImage]:
        """Prepare all images of a sample, in order.

        One call per sample, because some families treat an image differently when there are several.
        """

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        """Write the prompt of a sample, followed by `answer` and the end of the turn unless it is None.

        Raises:
            UserError: the text contains placeholders of the model, or the prompt is too long for it.
        """


@pytree
class PromptBatch:
    """Prompts of one bucket, as arrays."""

    text_ids: Int[Array | np.ndarray, "B X"]
    layout: TokenLayout
    rope_positions: Int[Array | np.ndarray, "B axes T"]
    """In packed order, like the states."""
    next_rope: Int[Array | np.ndarray, " B"]
    answer_slots: Int[Array | np.ndarray, "B A"]
    """Text slots that are followed by an answer token; 0 where `answer_targets` is `IGNORE`."""
    answer_targets: Int[Array | np.ndarray, "B A"]
    """Those answer tokens."""

    @property
    def last_prompt_slot(self) -> Int[Array, " B"]:
        """Text slot of the last token before the answer, in each row."""
        last = jnp.asarray(self.layout.num_text) - 1
        if not self.answer_slots.shape[1]:
            return last
        answered = jnp.asarray(self.answer_targets[:, 0]) != IGNORE
        return jnp.where(answered, jnp.asarray(self.answer_slots[:, 0]), last)


def collate(prompts: Sequence[Prompt], samples: Sequence[int], bucket: Bucket, answer_slots: int) -> PromptBatch:
    """Batch prompts that all fit the bucket and the answer slots; `samples` are the numbers of their samples in the run."""
    layout = pack_layout([prompt.is_visual for prompt in prompts], bucket, samples)
    slots = np.zeros((len(prompts), answer_slots), np.int32)
    targets = np.full((len(prompts), answer_slots), IGNORE, np.int32)
    for row, prompt in enumerate(prompts):
        # The answer ends the prompt, so its tokens are in the last text slots of the row.
        count = prompt.answer_length
        slots[row, :count] = np.arange(prompt.num_text - count - 1, prompt.num_text - 1)
        targets[row, :count] = prompt.token_ids[len(prompt.token_ids) - count :]
    return PromptBatch(
        text_ids=pack_rows([prompt.token_ids for prompt in prompts], layout)[:, : bucket.text],
        layout=layout,
        rope_positions=pack_rows([p.rope_positions.T for p in prompts], layout).transpose(0, 2, 1),
        next_rope=np.array([prompt.next_rope for prompt in prompts], np.int32),
        answer_slots=slots,
        answer_targets=targets,
    )
