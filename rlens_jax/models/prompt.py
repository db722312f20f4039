"""A sample before the decoder reads it: prepared images, prompts of token ids with rotary positions, and batches of prompts.

Prompts that begin with the same tokens, images included, share a row of a batch (`Branches`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from PIL.Image import Image

from rlens_jax.data.images import Transparency
from rlens_jax.data.samples import Sample
from rlens_jax.layout import Bucket, TokenLayout, Tokens, pack_layout, pack_rows
from rlens_jax.models.chat import Chat
from rlens_jax.pytrees import pytree

IGNORE = -1
"""Target of a place that has no answer token."""

FILLER = -1
"""The sample number of a branch that only fills a batch."""

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

    def answered(self, tokens: Sequence[int]) -> "Prompt":
        """This bare prompt with the tokens of an answer, at the positions at which generation puts them."""
        count = len(tokens)
        rope = np.broadcast_to(self.next_rope + np.arange(count, dtype=np.int32), (len(self.rope_positions), count))
        return Prompt(
            token_ids=np.concatenate([self.token_ids, np.array(tokens, np.int32)]),
            is_visual=np.concatenate([self.is_visual, np.zeros(count, bool)]),
            rope_positions=np.concatenate([self.rope_positions, rope], axis=1),
            next_rope=self.next_rope + count,
            answer_length=count,
        )

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())

    @property
    def num_text(self) -> int:
        return len(self.is_visual) - self.num_visual


@dataclass(frozen=True)
class Branches:
    """Prompts that share a row: the first `trunk` tokens, which are equal and hold all images, and the rest of each prompt."""

    prompts: tuple[Prompt, ...]
    trunk: int

    @classmethod
    def alone(cls, prompt: Prompt) -> "Branches":
        """A row of one prompt; its answer, if it has one, is the branch."""
        return cls((prompt,), len(prompt.token_ids) - prompt.answer_length)

    @property
    def num_visual(self) -> int:
        return self.prompts[0].num_visual

    @property
    def num_text(self) -> int:
        """Text tokens of the trunk and of all branches."""
        return self.trunk - self.num_visual + sum(len(prompt.token_ids) - self.trunk for prompt in self.prompts)

    @property
    def num_answers(self) -> int:
        """Answer tokens of all branches."""
        return sum(prompt.answer_length for prompt in self.prompts)

    @property
    def tokens(self) -> Tokens:
        """The tokens in the order in which `joined` puts values."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        branch = [np.full(length - self.trunk, number, np.int32) for number, length in enumerate(lengths, 1)]
        return Tokens(
            is_visual=self.joined([prompt.is_visual for prompt in self.prompts]),
            position=self.joined([np.arange(length, dtype=np.int32) for length in lengths]),
            branch=np.concatenate([np.zeros(self.trunk, np.int32), *branch]),
        )

    def joined(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Values [T_i, ...] of each prompt's tokens as those of the row: the trunk's, then those of branch after branch."""
        return np.concatenate([values[0][: self.trunk], *(each[self.trunk :] for each in values)])


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


@dataclass(frozen=True)
class Places:
    """Static numbers of places in each row of a batch, in addition to its bucket."""

    branches: int
    """Q."""
    answers: int
    """Tokens of all answers of a row, A."""
    leading_text: int | None = None
    """As `TokenLayout.leading_text`."""


@pytree
class PromptBatch:
    """Rows of one bucket, as arrays. Branch q, from 0, has the number q + 1 in the layout."""

    text_ids: Int[Array | np.ndarray, "B X"]
    layout: TokenLayout
    rope_positions: Int[Array | np.ndarray, "B axes T"]
    """In packed order, like the states."""
    samples: Int[Array | np.ndarray, "B Q"]
    """Number of each branch's sample in the run, or `FILLER`."""
    prompt_end: Int[Array | np.ndarray, "B Q"]
    """Text slot of the last token before each branch's answer; it may be in the trunk."""
    next_position: Int[Array | np.ndarray, "B Q"]
    """Sequence position of the token that follows each branch."""
    next_rope: Int[Array | np.ndarray, "B Q"]
    """Its rotary position, the same on all axes."""
    answer_slots: Int[Array | np.ndarray, "B A"]
    """Text slots that are followed by an answer token; 0 where `answer_targets` is `IGNORE`."""
    answer_targets: Int[Array | np.ndarray, "B A"]
    """Those answer tokens."""
    answer_branch: Int[Array | np.ndarray, "B A"]
    """The branch of each, from 0."""


def collate(
    rows: Sequence[Branches], samples: Sequence[Sequence[int]], seeds: Sequence[int], bucket: Bucket, places: Places
) -> PromptBatch:
    """Batch rows that all fit the bucket and the places.

    Args:
        samples: the numbers of the samples of each row's branches in the run.
        seeds: as `TokenLayout.seed`.
    """
    layout = pack_layout([row.tokens for row in rows], bucket, seeds, places.branches, places.leading_text)
    shape = len(rows), places.branches
    numbers = np.full(shape, FILLER, np.int32)
    prompt_end, next_position, next_rope = (np.zeros(shape, np.int32) for _ in range(3))
    slots, branch = (np.zeros((len(rows), places.answers), np.int32) for _ in range(2))
    targets = np.full((len(rows), places.answers), IGNORE, np.int32)
    for number, row in enumerate(rows):
        numbers[number, : len(samples[number])] = samples[number]
        trunk_text = row.trunk - row.num_visual
        start, answered = trunk_text, 0  # the next branch's first text slot and first answer place
        for place, prompt in enumerate(row.prompts):
            count, stop = prompt.answer_length, start + len(prompt.token_ids) - row.trunk
            end = stop - count - 1
            prompt_end[number, place] = end if end >= start else trunk_text - 1
            next_position[number, place], next_rope[number, place] = len(prompt.token_ids), prompt.next_rope
            mine = slice(answered, answered + count)
            slots[number, mine] = [prompt_end[number, place], *range(stop - count, stop - 1)][:count]
            targets[number, mine] = prompt.token_ids[len(prompt.token_ids) - count :]
            branch[number, mine] = place
            start, answered = stop, answered + count
    rope = pack_rows([row.joined([p.rope_positions.T for p in row.prompts]) for row in rows], layout)
    return PromptBatch(
        text_ids=pack_rows([row.joined([p.token_ids for p in row.prompts]) for row in rows], layout)[:, : bucket.text],
        layout=layout,
        rope_positions=rope.transpose(0, 2, 1),
        samples=numbers,
        prompt_end=prompt_end,
        next_position=next_position,
        next_rope=next_rope,
        answer_slots=slots,
        answer_targets=targets,
        answer_branch=branch,
    )


def collate_alone(prompts: Sequence[Prompt], bucket: Bucket, answers: int = 0) -> PromptBatch:
    """Batch prompts, each in a row of its own and numbered from 0; `answers` is the number of places for answer tokens."""
    rows, numbers = [Branches.alone(prompt) for prompt in prompts], range(len(prompts))
    return collate(rows, [[number] for number in numbers], numbers, bucket, Places(1, answers))
