"""Fewer visual tokens before the first layer: which ones a sample keeps, or what they are merged to.

Additional axis word: `survivors`, the slots for surviving visual tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.kept_tokens import CDPruner, DivPrune, FasterVLM, Pooling, RandomTokens, Selection, TowerSelection, VisionZip
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.layers import embed_tokens
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.token_pruning import merge_similar, most_attended, num_survivors
from rlens_jax.ops.token_selection import (
    Budget,
    drawn_tokens,
    most_diverse,
    most_relevant_and_diverse,
    pooled_tokens,
    relevance,
    strided_tokens,
    zipped_tokens,
)
from rlens_jax.pruning import Folder


class Survivors(NamedTuple):
    """What is left of a batch's visual tokens."""

    visual: Float[Array, "B survivors visual_width"]
    ordinals: Int[Array, "B survivors"]
    """Ascending; P in unused slots."""
    num_kept: Int[Array, " B"]
    scored: Bool[Array, " B"]
    """Whether all scores by which tokens were chosen were finite."""


def survivors(
    decoder: Decoder, visual: Float[Array, "B P visual_width"], batch: PromptBatch, pruning: Folder | Selection, random_key: Array
) -> Survivors:
    """The visual tokens that enter the first layer, P > 0.

    Methods that look into the tower need the marks of `families.tower_marks` behind each token. Other methods compare tokens by
    what the first layer reads. Deepstack features go with them.
    """
    layout, width, whole = batch.layout, decoder.config.width, decoder.config.visual_width
    visual, marks = visual[:, :, :whole], visual[:, :, whole:].astype(jnp.float32)
    num_kept, scored = num_survivors(layout, pruning), jnp.ones(len(visual), bool)
    if isinstance(pruning, Folder):
        return Survivors(*merge_similar(visual, layout, pruning, width), num_kept, scored)
    budget, tokens = Budget(num_kept, pruning.capacity(layout.bucket.visual)), visual[:, :, :width]
    if isinstance(pruning, Pooling):
        return Survivors(*pooled_tokens(visual, layout, budget, pruning), num_kept, scored)
    if isinstance(pruning, TowerSelection):
        if marks.shape[2] < 2:
            raise ValueError(f"{pruning.title} needs visual tokens with marks")
        real = jnp.arange(layout.bucket.visual)[None] < jnp.asarray(layout.num_visual)[:, None]
        scored = jnp.where(real[:, :, None], jnp.isfinite(marks), True).all(axis=(1, 2))
    if isinstance(pruning, VisionZip):
        return Survivors(*zipped_tokens(visual, marks, layout, budget, pruning), num_kept, scored)
    if isinstance(pruning, FasterVLM):
        ordinals = most_attended(marks[:, :, 0], layout, *budget)
    elif isinstance(pruning, RandomTokens):
        # The layers fold in their numbers, which are smaller.
        ordinals = drawn_tokens(layout, budget, jax.random.fold_in(random_key, decoder.config.num_layers))
    elif isinstance(pruning, DivPrune):
        ordinals, scored = most_diverse(tokens, layout, budget)
    elif isinstance(pruning, CDPruner):
        text = embed_tokens(decoder.embedding[...], jnp.asarray(batch.text_ids))
        relevant = relevance(tokens, layout, text, _question(batch))
        ordinals, scored = most_relevant_and_diverse(tokens, relevant, layout, budget)
    else:
        ordinals = strided_tokens(layout, budget)
    return Survivors(jnp.take_along_axis(visual, ordinals[:, :, None], axis=1, mode="clip"), ordinals, num_kept, scored)


def _question(batch: PromptBatch) -> Bool[Array, "B X"]:
    """The text tokens behind the last visual token, up to the end of the prompt; all of its text if none are behind it."""
    layout = batch.layout
    text, visual = jnp.asarray(layout.text_position), jnp.asarray(layout.visual_position)
    real = jnp.arange(layout.bucket.visual)[None] < jnp.asarray(layout.num_visual)[:, None]
    last = jnp.where(real, visual, -1).max(axis=1, keepdims=True)
    asked = jnp.arange(layout.bucket.text)[None] <= jnp.asarray(batch.prompt_end)[:, :1]
    behind = asked & (text > last)
    return jnp.where(behind.any(axis=1, keepdims=True), behind, asked)
