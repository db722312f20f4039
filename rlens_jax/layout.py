"""Where the text and the visual tokens of a batch are: `TokenLayout`, which all parts of the project share.

All decoder states are *packed*. A batch with bucket (X text slots, P visual slots) is one array of T = X + P slots: the first X
hold the text tokens, the last P the visual tokens of all images of the sample. Both runs are in sequence order, with padding at
their end. The slot of a visual token within its run is its *ordinal*. Visual -> visual masks are therefore static bands for any
images. The order of text and visual tokens is data: the sequence position of each slot. (Our decision, docs/method.md.)

A row may hold several prompts that begin with the same tokens, images included. These tokens are its *trunk*, the rest of each
prompt is a *branch*. A branch sees the trunk and itself, and its tokens have the positions that they have without the other
branches. The text run is the trunk's text, then branch after branch. All visual tokens are in the trunk.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
    """Some slots of a batch, int32."""

    position: Int[Array, "B T"]
    """Sequence position."""
    ordinal: Int[Array, "B T"]
    """Visual ordinal, -1 for text."""
    branch: Int[Array, "B T"]
    """Number of the branch from 1; 0 is the trunk."""

    def cut(self, select: Callable[[Array], Array]) -> "Slots":
        """The slots that `select` takes from an array [B, T]."""
        return Slots(select(self.position), select(self.ordinal), select(self.branch))


@pytree
class TokenLayout:
    """The packing of a batch. Positions are int32 sequence indices; empty slots are at `PADDING_POSITION`."""

    text_position: Int[Array | np.ndarray, "B X"]
    visual_position: Int[Array | np.ndarray, "B P"]
    text_branch: Int[Array | np.ndarray, "B X"]
    """The branch of each text slot, 0 for the trunk and for empty slots."""
    num_text: Int[Array | np.ndarray, " B"]
    num_visual: Int[Array | np.ndarray, " B"]
    seed: Int[Array | np.ndarray, " B"]
    """Seeds random probes: the number of the first sample with the row's trunk."""
    max_branches: int = field(default=1, metadata={"static": True})
    """Max branches of a row. With one, each row is a plain causal sequence, and nothing is spent on branches."""
    leading_text: int | None = field(default=None, metadata={"static": True})
    """Number of text slots behind which no row has text that precedes a visual token; None if unknown. Visual tokens then meet
    these slots only, instead of all questions about them."""

    @property
    def bucket(self) -> Bucket:
        return Bucket(text=self.text_position.shape[1], visual=self.visual_position.shape[1])

    @property
    def slots_before_visual(self) -> int:
        """Number of text slots that visual tokens meet."""
        return self.bucket.text if self.leading_text is None else min(self.leading_text, self.bucket.text)

    @property
    def text(self) -> Slots:
        position = jnp.asarray(self.text_position)
        return Slots(position, jnp.full_like(position, -1), jnp.asarray(self.text_branch))

    @property
    def visual(self) -> Slots:
        ordinal = jax.lax.broadcasted_iota(jnp.int32, self.visual_position.shape, 1)
        return Slots(jnp.asarray(self.visual_position), ordinal, jnp.zeros_like(ordinal))

    @property
    def slots(self) -> Slots:
        """All packed slots, text run first."""
        return jax.tree.map(lambda *runs: jnp.concatenate(runs, axis=1), self.text, self.visual)


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

    A branch sees the trunk and itself. Trunk `t v v t`, branches `a a` and `b b`, R = 1:

            t v v t a a b b
        t   1 0 0 0 0 0 0 0
        v   1 1 0 0 0 0 0 0
        v   1 0 1 0 0 0 0 0
        t   1 1 1 1 0 0 0 0
        a   1 1 1 1 1 0 0 0
        a   1 1 1 1 1 1 0 0
        b   1 1 1 1 0 0 1 0
        b   1 1 1 1 0 0 1 1
    """
    later = query.position[:, :, None] - key.position[:, None, :]
    key_branch = key.branch[:, None, :]
    causal = (later >= 0) & ((key_branch == 0) | (key_branch == query.branch[:, :, None]))
    if attention_range is None:
        return causal
    both_visual = (query.ordinal >= 0)[:, :, None] & (key.ordinal >= 0)[:, None, :]
    distance = later if window == "position" else query.ordinal[:, :, None] - key.ordinal[:, None, :]
    return causal & (~both_visual | (distance < attention_range))


def keep_visual(layout: TokenLayout, ordinals: Int[Array, "B kept"], num_kept: Int[Array, " B"]) -> TokenLayout:
    """The layout after visual tokens were pruned: ordinals and positions count the remaining tokens again from 0.

    `ordinals` are those of the survivors, ascending per sample; entries from `num_kept` on are ignored. The rows have one branch.
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
    return TokenLayout(text, visual, layout.text_branch, layout.num_text, num_kept, layout.seed)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a row in order: the trunk, then branch after branch."""

    is_visual: np.ndarray
    """bool [T_i]; visual tokens are in the trunk."""
    position: np.ndarray
    """int32 [T_i]."""
    branch: np.ndarray
    """int32 [T_i]: 0 for the trunk, then 1, 2, ..."""

    @property
    def leading_text(self) -> int:
        """Number of text tokens that precede a visual token."""
        visual = np.flatnonzero(self.is_visual)
        return int(visual[-1]) + 1 - len(visual) if len(visual) else 0

    @classmethod
    def sequence(cls, is_visual: np.ndarray) -> "Tokens":
        """Tokens without branches."""
        position = np.arange(len(is_visual), dtype=np.int32)
        return cls(is_visual, position, np.zeros_like(position))


def pack_layout(
    rows: Sequence[Tokens], bucket: Bucket, seeds: Sequence[int], max_branches: int = 1, leading_text: int | None = None
) -> TokenLayout:
    """The layout of a batch, as NumPy arrays; `seeds` are those of the rows.

    Raises:
        ValueError: a row has more tokens than its bucket has slots, or too many branches, or too much text before an image.
    """
    text, visual = (np.full((len(rows), n), PADDING_POSITION, np.int32) for n in (bucket.text, bucket.visual))
    branch = np.zeros_like(text)
    for number, tokens in enumerate(rows):
        for slots, chosen in ((text, ~tokens.is_visual), (visual, tokens.is_visual)):
            if (count := int(chosen.sum())) > slots.shape[1]:
                raise ValueError(f"row {number} has {count} tokens for {slots.shape[1]} slots")
            slots[number, :count] = tokens.position[chosen]
        branches = tokens.branch[~tokens.is_visual]
        if branches.max(initial=0) > max_branches:
            raise ValueError(f"row {number} has {branches.max()} branches for {max_branches} places")
        if leading_text is not None and tokens.leading_text > leading_text:
            raise ValueError(f"row {number} has {tokens.leading_text} text tokens before visual ones for {leading_text} slots")
        branch[number, : len(branches)] = branches
    num_visual = np.array([tokens.is_visual.sum() for tokens in rows], np.int32)
    num_text = np.array([len(tokens.is_visual) for tokens in rows], np.int32) - num_visual
    return TokenLayout(text, visual, branch, num_text, num_visual, np.array(seeds, np.int32), max_branches, leading_text)


def pack_rows(rows: Sequence[np.ndarray], layout: TokenLayout) -> np.ndarray:
    """Packs per-token values in the order of `Tokens`, [T_i, ...] per row, to [B, T, ...]; empty slots are 0."""
    packed = np.zeros((len(rows), layout.bucket.slots, *rows[0].shape[1:]), rows[0].dtype)
    for number, row in enumerate(rows):
        slots, order = _places(layout, number)
        packed[number, slots] = row[order]
    return packed


def unpack_rows(packed: np.ndarray, layout: TokenLayout) -> list[np.ndarray]:
    """The inverse of `pack_rows`: packed [B, T, ...] to [T_i, ...] per row, without padding."""
    unpacked = []
    for number, row in enumerate(packed):
        slots, order = _places(layout, number)
        unpacked.append(row[slots[np.argsort(order)]])
    return unpacked


def _places(layout: TokenLayout, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The used slots of a row, and the place of each slot's token in the order of `Tokens`."""
    num_text, num_visual = int(layout.num_text[row]), int(layout.num_visual[row])
    text = np.arange(num_text)
    # A token of the trunk is preceded by as many tokens as its position says, a token of a branch by all visual tokens.
    in_trunk = np.asarray(layout.text_branch)[row, :num_text] == 0
    order = np.where(in_trunk, np.asarray(layout.text_position)[row, :num_text], text + num_visual)
    slots = np.concatenate([text, layout.bucket.text + np.arange(num_visual)])
    return slots, np.concatenate([order, np.asarray(layout.visual_position)[row, :num_visual]])
