"""Where the text and the visual tokens of a batch are: `TokenLayout`, which all parts of the project share.

All decoder states are *packed*. A batch with bucket (X text slots, P visual slots) is one array of T = X + P slots: the first X
hold the text tokens, the last P the visual tokens of all images of the sample. Both runs are in sequence order, with padding at
their end. The slot of a visual token within its run is its *ordinal*. Visual -> visual masks are therefore static bands for any
images. The order of text and visual tokens is data: the sequence position of each slot. (Our decision, docs/method.md.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.pytrees import pytree

PADDING_POSITION = 2**30
"""Sequence position of an empty slot: later than every token, so no token sees it."""

Window = Literal["ordinal", "position"]
"""How the distance between visual tokens is counted: in visual tokens (our reading of the paper), or in all tokens."""

Range = int | None
"""R of Hollow Attention, or None for dense attention."""

Queries = Float[Array, "B N T H"]
"""Packed queries, or outputs of attention."""
KV = Float[Array, "B K T H"]
"""Packed keys, or values."""


@dataclass(frozen=True)
class Bucket:
    """A static shape: numbers of text and visual slots per sample."""

    text: int
    visual: int

    @property
    def slots(self) -> int:
        """Packed slots per sample, T."""
        return self.text + self.visual

    @property
    def size(self) -> tuple[int, int]:
        """Text and visual slots."""
        return self.text, self.visual


def smallest_bucket(sizes: Iterable[int], count: int) -> int | None:
    """The smallest of the bucket sizes that holds `count`, None if none does."""
    return min((size for size in sizes if size >= count), default=None)


@pytree
class Slots:
    """Some slots of a batch: int32 sequence positions, and visual ordinals, which are -1 for text."""

    position: Int[Array, "B T"]
    ordinal: Int[Array, "B T"]


@pytree
class TokenLayout:
    """The packing of a batch. Positions are int32 sequence indices; empty slots are at `PADDING_POSITION`."""

    text_position: Int[Array | np.ndarray, "B X"]
    visual_position: Int[Array | np.ndarray, "B P"]
    num_text: Int[Array | np.ndarray, " B"]
    num_visual: Int[Array | np.ndarray, " B"]
    sample: Int[Array | np.ndarray, " B"]
    """Number of the sample in the run; it seeds random probes."""

    @property
    def bucket(self) -> Bucket:
        return Bucket(text=self.text_position.shape[1], visual=self.visual_position.shape[1])

    @property
    def text(self) -> Slots:
        position = jnp.asarray(self.text_position)
        return Slots(position, jnp.full_like(position, -1))

    @property
    def visual(self) -> Slots:
        ordinal = jax.lax.broadcasted_iota(jnp.int32, self.visual_position.shape, 1)
        return Slots(jnp.asarray(self.visual_position), ordinal)

    @property
    def slots(self) -> Slots:
        """All packed slots, text run first."""
        text, visual = self.text, self.visual
        return Slots(
            jnp.concatenate([text.position, visual.position], axis=1), jnp.concatenate([text.ordinal, visual.ordinal], axis=1)
        )

    @property
    def num_tokens(self) -> Int[Array | np.ndarray, " B"]:
        return self.num_text + self.num_visual


def visible(query: Slots, key: Slots, attention_range: Range, window: Window = "ordinal") -> Bool[Array, "B T S"]:
    """Which keys each query sees (paper, Hollow Attention).

    Text `t`, visual `v`, R = 2, sequence `t v v v t v t`:

            t v v v t v t
        t   1 0 0 0 0 0 0
        v   1 1 0 0 0 0 0
        v   1 1 1 0 0 0 0
        v   1 0 1 1 0 0 0
        t   1 1 1 1 1 0 0
        v   1 0 0 1 1 1 0
        t   1 1 1 1 1 1 1
    """
    later = query.position[:, :, None] - key.position[:, None, :]
    causal = later >= 0
    if attention_range is None:
        return causal
    both_visual = (query.ordinal >= 0)[:, :, None] & (key.ordinal >= 0)[:, None, :]
    distance = later if window == "position" else query.ordinal[:, :, None] - key.ordinal[:, None, :]
    return causal & (~both_visual | (distance < attention_range))


def keep_visual(layout: TokenLayout, ordinals: Int[Array, "B kept"], num_kept: Int[Array, " B"]) -> TokenLayout:
    """The layout after visual tokens were pruned: ordinals and positions count the remaining tokens again from 0.

    `ordinals` are those of the survivors, ascending per sample; entries from `num_kept` on are ignored.
    """
    slot = jax.lax.broadcasted_iota(jnp.int32, ordinals.shape, 1)
    survives = slot < jnp.asarray(num_kept)[:, None]
    # A position counts all tokens before it, an ordinal the visual ones.
    before = jnp.take_along_axis(jnp.asarray(layout.visual_position), ordinals, axis=1, mode="clip") - ordinals
    visual = jnp.where(survives, slot + before, PADDING_POSITION)
    text_slot = jax.lax.broadcasted_iota(jnp.int32, layout.text_position.shape, 1)
    visual_before = jnp.asarray(layout.text_position) - text_slot
    earlier = survives[:, None, :] & (ordinals[:, None, :] < visual_before[:, :, None])
    text = text_slot + earlier.sum(axis=2, dtype=jnp.int32)
    text = jnp.where(text_slot < jnp.asarray(layout.num_text)[:, None], text, PADDING_POSITION)
    return TokenLayout(text, visual, layout.num_text, num_kept, layout.sample)


def pack_layout(is_visual: Sequence[np.ndarray], bucket: Bucket, samples: Sequence[int]) -> TokenLayout:
    """The layout of a batch, as NumPy arrays.

    `is_visual` is bool [T_i] per sample; `samples` are the numbers of the samples in the run.

    Raises:
        ValueError: a sample has more tokens than its bucket has slots.
    """
    text, visual = (np.full((len(is_visual), n), PADDING_POSITION, np.int32) for n in (bucket.text, bucket.visual))
    for row, mask in enumerate(is_visual):
        for slots, positions in ((text, np.flatnonzero(~mask)), (visual, np.flatnonzero(mask))):
            if len(positions) > slots.shape[1]:
                raise ValueError(f"sample {samples[row]} has {len(positions)} tokens for {slots.shape[1]} slots")
            slots[row, : len(positions)] = positions
    num_visual = np.array([mask.sum() for mask in is_visual], np.int32)
    num_text = np.array([len(mask) for mask in is_visual], np.int32) - num_visual
    return TokenLayout(text, visual, num_text, num_visual, np.array(samples, np.int32))


def pack_rows(rows: Sequence[np.ndarray], layout: TokenLayout) -> np.ndarray:
    """Packs per-token values in sequence order, [T_i, ...] per sample, to [B, T, ...]; empty slots are 0."""
    bucket = layout.bucket
    packed = np.zeros((len(rows), bucket.slots, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        num_text, num_visual = int(layout.num_text[i]), int(layout.num_visual[i])
        packed[i, :num_text] = row[layout.text_position[i, :num_text]]
        packed[i, bucket.text : bucket.text + num_visual] = row[layout.visual_position[i, :num_visual]]
    return packed


def unpack_rows(packed: np.ndarray, layout: TokenLayout) -> list[np.ndarray]:
    """The inverse of `pack_rows`: packed [B, T, ...] to [T_i, ...] per sample, without padding."""
    positions = np.concatenate([layout.text_position, layout.visual_position], axis=1)
    return [
        row[np.argsort(position, kind="stable")[: int(count)]]
        for row, position, count in zip(packed, positions, np.asarray(layout.num_tokens), strict=True)
    ]
