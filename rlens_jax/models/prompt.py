"""A sample on its way into a decoder: prepared images, tokens with their rotary positions, and batches of them.

Axis letters: B batch, X text slots, P visual slots, T = X + P packed slots, A answer slots, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rlens_jax.layout import Bucket, TokenLayout, pack_layout, pack_rows

IGNORE = -1
"""Target of a slot that answers nothing."""


@dataclass(frozen=True)
class PreparedImage:
    """What a vision tower reads of one image: arrays already padded to a bucket, and how many visual tokens it gives."""

    arrays: tuple[np.ndarray, ...]
    num_tokens: int


@dataclass(frozen=True)
class Prompt:
    """One sequence of a sample: the prompt, or the prompt with a reference answer and the end-of-turn token after it."""

    token_ids: np.ndarray
    """int32 [T_i]; image tokens hold the family's placeholder."""
    is_visual: np.ndarray
    """bool [T_i]."""
    rope_positions: np.ndarray
    """int32 [axes, T_i]."""
    next_rope: int
    """Rotary position of the first token that would follow, the same on all axes."""
    answer_length: int
    """How many of the last tokens are answer and end of turn; 0 in a bare prompt."""

    @property
    def num_visual(self) -> int:
        return int(self.is_visual.sum())

    @property
    def num_text(self) -> int:
        return len(self.is_visual) - self.num_visual


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptBatch:
    """Sequences of one bucket, as arrays."""

    text_ids: Int[Array | np.ndarray, "B X"]
    layout: TokenLayout
    rope_positions: Int[Array | np.ndarray, "B axes T"]
    """Packed like the states."""
    next_rope: Int[Array | np.ndarray, " B"]
    answer_slots: Int[Array | np.ndarray, "B A"]
    """Text slots whose next token belongs to the answer; 0 where `answer_targets` is `IGNORE`."""
    answer_targets: Int[Array | np.ndarray, "B A"]
    """The next tokens."""

    @property
    def last_prompt_slot(self) -> Int[Array, " B"]:
        """Text slots of each prompt's last token, whether an answer follows or not."""
        last = jnp.asarray(self.layout.num_text) - 1
        if not self.answer_slots.shape[1]:
            return last
        answered = jnp.asarray(self.answer_targets[:, 0]) != IGNORE
        return jnp.where(answered, jnp.asarray(self.answer_slots[:, 0]), last)


def collate(prompts: Sequence[Prompt], samples: Sequence[int], bucket: Bucket, answer_slots: int) -> PromptBatch:
    """A batch of `prompts`, all of which must fit the bucket and the answer slots.

    Args:
        prompts: the sequences.
        samples: the number that names each one's sample in the run.
        bucket: static text and visual slots.
        answer_slots: static number of answer tokens.
    """
    layout = pack_layout([prompt.is_visual for prompt in prompts], bucket, samples)
    slots = np.zeros((len(prompts), answer_slots), np.int32)
    targets = np.full((len(prompts), answer_slots), IGNORE, np.int32)
    for row, prompt in enumerate(prompts):
        # The answer is the last run of text, so its tokens fill the last text slots of the row.
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
