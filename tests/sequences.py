"""Samples spelled as text ("t" a text token, "v" a visual one) and their values, packed and unpacked."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlens_jax.layout import Bucket, TokenLayout, Tokens, pack_layout, pack_rows, unpack_rows


def spell(sequence: str) -> np.ndarray:
    """bool[T], True at "v"; blanks are ignored."""
    return np.array([token == "v" for token in sequence.replace(" ", "")], bool)


def run_length(*counts: int) -> np.ndarray:
    """bool[T] of alternating runs, text first: 2, 7, 1 is `tt vvvvvvv t`."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def bucket_for(masks: Sequence[np.ndarray], spare: tuple[int, int] = (0, 0)) -> Bucket:
    """The smallest bucket for the samples, and `spare` text and visual slots more."""
    text, visual = max((~m).sum() for m in masks), max(m.sum() for m in masks)
    return Bucket(text=int(text) + spare[0], visual=int(visual) + spare[1])


def make_layout(
    masks: Sequence[np.ndarray], spare: tuple[int, int] = (0, 0), samples: Sequence[int] | None = None
) -> TokenLayout:
    """The layout of a batch, on the device."""
    layout = pack_layout([Tokens.sequence(mask) for mask in masks], bucket_for(masks, spare), samples or range(len(masks)))
    return jax.tree.map(jnp.asarray, layout)


def fork(trunk: np.ndarray, lengths: Sequence[int]) -> Tokens:
    """A row: the trunk's tokens, bool [T], and text branches of these lengths."""
    ends = [len(trunk) + length for length in lengths]
    return Tokens(
        is_visual=np.concatenate([trunk, np.zeros(sum(lengths), bool)]),
        position=np.concatenate([np.arange(len(trunk)), *(np.arange(len(trunk), end) for end in ends)]).astype(np.int32),
        branch=np.repeat(np.arange(len(lengths) + 1), [len(trunk), *lengths]).astype(np.int32),
    )


def forked_layout(rows: Sequence[Tokens], spare: tuple[int, int] = (0, 0)) -> TokenLayout:
    """The layout of rows with branches, on the device."""
    most = max(int(row.branch.max(initial=1)) for row in rows)
    bucket, leading = bucket_for([row.is_visual for row in rows], spare), max(row.leading_text for row in rows)
    layout = pack_layout(rows, bucket, range(len(rows)), most, leading)
    return jax.tree.map(jnp.asarray, layout)


def branch_tokens(row: Tokens, count: int) -> list[np.ndarray]:
    """The places in the row of the tokens of each of its `count` prompts, the trunk's first."""
    return [np.flatnonzero((row.branch == 0) | (row.branch == number)) for number in range(1, count + 1)]


def random_rows(rng: np.random.Generator, masks: Sequence[np.ndarray], *shape: int) -> list[np.ndarray]:
    """For each sample float32 [T_i, *shape], standard normal."""
    return [rng.standard_normal((len(mask), *shape)).astype(np.float32) for mask in masks]


def pack(
    rows: Sequence[np.ndarray], layout: TokenLayout, padding: Callable[[tuple[int, ...]], np.ndarray] = np.zeros
) -> np.ndarray:
    """`pack_rows`, with `padding(shape)` in the empty slots."""
    packed = pack_rows(rows, layout)
    empty = np.ones(packed.shape[:2], bool)
    for row, (text, visual) in enumerate(zip(layout.num_text, layout.num_visual, strict=True)):
        empty[row, : int(text)] = False
        empty[row, layout.bucket.text : layout.bucket.text + int(visual)] = False
    packed[empty] = padding(packed.shape)[empty]
    return packed


def unpack(packed, layout: TokenLayout) -> list[np.ndarray]:
    return unpack_rows(np.asarray(packed), jax.tree.map(np.asarray, layout))
