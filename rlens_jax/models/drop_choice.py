"""Which visual tokens stay where a method drops some between two layers, from the states there.

Text sees all earlier tokens, in a reduced layer too, so scores that text gives can be read in any layer, whatever its setting. A
layer forms its weights inside its kernel; the few rows that a method looks at are computed again here.

Additional axis words: `survivors`, the slots for surviving visual tokens; `pivots`, those of DART.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.drops import DART, PyramidDrop, SparseVLM, Stage
from rlens_jax.layout import KV, PADDING_POSITION, TokenLayout, visible
from rlens_jax.models.decoder import Context, Decoder, States
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.token_pruning import attention_received, least_similar, mean_of_heads, most_attended, recycle, survivors_of
from rlens_jax.pruning import VTW, FastV
from rlens_jax.sharding.model_axis import sum_over_shards

Dropping = FastV | VTW | PyramidDrop | SparseVLM | DART
"""The methods that drop tokens between layers."""


@dataclass(frozen=True)
class Prompts:
    """What a method knows of the prompts at every drop."""

    end: Int[Array, " B"]
    """Text slot of the last token. Answers behind it have no say: they are scored with the tokens that generation would see."""
    num_visual: Int[Array, " B"]
    """Visual tokens before the first drop."""
    visual_slots: int
    """Slots for them."""
    behind: Bool[Array, "B X"]
    """The text behind the last visual token."""
    raters: Bool[Array, "B X"]
    """The text that scores for SparseVLM."""


@dataclass(frozen=True)
class Here:
    """The states at a drop."""

    layer: int
    """Number of layers before it."""
    entering: States
    """The states that entered the last of these layers."""
    x: States
    """The states now."""
    keys: KV
    """The keys of the last layer."""
    context: Context


class Choice(NamedTuple):
    """What a method decides."""

    ordinals: Int[Array, "B survivors"]
    """Ordinals of the tokens that stay, ascending; P in empty slots."""
    num_kept: Int[Array, " B"]
    x: States
    """The states, in which tokens that stay may hold what was merged into them."""
    features: Float[Array, "B P features"] | None
    """Their deepstack features."""
    finite: Bool[Array, " B"]
    """Whether all scores were finite."""


def look_at(batch: PromptBatch, x: States, layout: TokenLayout) -> Prompts:
    """The prompts, from the states that enter the first layer."""
    num_text = layout.bucket.text
    end = jnp.asarray(batch.prompt_end)[:, 0]
    visual = jnp.asarray(layout.visual_position)
    last = jnp.where(visual < PADDING_POSITION, visual, -1).max(axis=1, initial=-1)
    slot = jax.lax.broadcasted_iota(jnp.int32, layout.text_position.shape, 1)
    behind = (jnp.asarray(layout.text_position) > last[:, None]) & (slot <= end[:, None])
    raters = _raters(x[:, :num_text], x[:, num_text:], behind, jnp.asarray(layout.num_visual))
    return Prompts(end, jnp.asarray(layout.num_visual), layout.bucket.visual, behind, raters)


def choose(decoder: Decoder, pruning: Dropping, step: int, stage: Stage, prompts: Prompts, here: Here) -> Choice:
    """The tokens that stay after step number `step` of a method, at `stage`."""
    layout, features = here.context.layout, here.context.features
    num_text, capacity = layout.bucket.text, stage.kept(prompts.visual_slots)
    num_kept = survivors_of(prompts.visual_slots, stage.kept)[prompts.num_visual]
    if not layout.bucket.visual or not capacity:
        nobody, good = jnp.zeros((here.x.shape[0], 0), jnp.int32), jnp.ones(here.x.shape[0], bool)
        return Choice(nobody, num_kept, here.x, features, good)
    if isinstance(pruning, DART):
        kept, finite = _unlike_pivots(decoder, pruning, prompts, here, num_kept)
        return Choice(_ordinals(kept, capacity), num_kept, here.x, features, finite)
    received = _received(decoder, pruning, prompts, here)
    finite, scores = jnp.isfinite(received).all(axis=1), received[:, num_text:]
    if not (isinstance(pruning, SparseVLM) and pruning.merges):
        return Choice(most_attended(scores, layout, num_kept, capacity), num_kept, here.x, features, finite)
    chosen_of = partial(pruning.chosen, step)
    num_chosen = survivors_of(prompts.visual_slots, chosen_of)[prompts.num_visual]
    ordinals = most_attended(scores, layout, num_chosen, chosen_of(prompts.visual_slots))
    kept = (ordinals[:, :, None] == jnp.arange(layout.bucket.visual)[None, None]).any(axis=1)
    dropped = ~kept & (jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1) < jnp.asarray(layout.num_visual)[:, None])
    width, x = here.x.shape[2], here.x[:, num_text:]
    tokens = x if features is None else jnp.concatenate([x, features], axis=2)
    tokens, centres = recycle(tokens, scores, dropped, layout.bucket.visual - chosen_of(prompts.visual_slots), width)
    return Choice(
        _ordinals(kept | centres, capacity),
        num_kept,
        jnp.concatenate([here.x[:, :num_text], tokens[:, :, :width]], axis=1),
        None if features is None else tokens[:, :, width:],
        finite,
    )


def _received(decoder: Decoder, pruning: Dropping, prompts: Prompts, here: Here) -> Float[Array, "B T"]:
    """The attention that all tokens receive from those that a method asks."""
    context, layout = here.context, here.context.layout
    slots = layout.slots
    last = prompts.end[:, None]
    heads, asked, asks = None, last, jnp.ones_like(last, bool)
    if isinstance(pruning, SparseVLM):
        heads, asks = pruning.heads, prompts.raters
        asked = jnp.broadcast_to(jnp.arange(layout.bucket.text)[None], asks.shape)
    elif isinstance(pruning, FastV) and pruning.attention == "all_tokens":
        end = jnp.take_along_axis(slots.position, last, axis=1)
        asks = slots.position <= end
        asked = jnp.broadcast_to(jnp.arange(layout.bucket.slots)[None], asks.shape)
    cos, sin = (take_rows(part, asked) for part in context.rotary)
    if isinstance(pruning, PyramidDrop):
        # As the layer that follows would see them.
        module = decoder.layer(here.layer)
        q = module.attention.queries(module.input_norm(take_rows(here.x, asked)), (cos, sin))
        keys, _ = module.attention.keys_values(module.input_norm(here.x), context.rotary)
    else:
        module, keys = decoder.layer(here.layer - 1), here.keys
        q = module.attention.queries(module.input_norm(take_rows(here.entering, asked)), (cos, sin))

    def sees(number: Int[Array, " block"]) -> Bool[Array, "B block S"]:
        rows = asked[:, number]
        return visible(slots.cut(lambda x: jnp.take_along_axis(x, rows, axis=1)), slots, None)

    return mean_of_heads(attention_received(q, keys, sees, asks), slice(layout.bucket.text, None), heads)


def _raters(
    text: Float[Array, "B X D"], visual: Float[Array, "B P D"], behind: Bool[Array, "B X"], num_visual: Int[Array, " B"]
) -> Bool[Array, "B X"]:
    """The text that matches the image (SparseVLM)."""
    products = jnp.einsum("BPD,BXD->BPX", visual, text, preferred_element_type=jnp.float32, precision="highest")
    shares = jax.nn.softmax(jnp.where(behind[:, None], products, -jnp.inf), axis=2)
    real = jax.lax.broadcasted_iota(jnp.int32, products.shape[:2], 1) < num_visual[:, None]
    count_visual, count = (jnp.maximum(n, 1).astype(jnp.float32)[:, None] for n in (num_visual, behind.sum(axis=1)))
    mean = jnp.where(real[:, :, None], shares, jnp.float32(0)).sum(axis=1) / count_visual
    raters = behind & (mean > 1 / count)  # over the text behind the image, it sums to 1
    return jnp.where(raters.any(axis=1, keepdims=True), raters, behind)


def _unlike_pivots(
    decoder: Decoder, pruning: DART, prompts: Prompts, here: Here, num_kept: Int[Array, " B"]
) -> tuple[Bool[Array, "B P"], Bool[Array, " B"]]:
    """The visual tokens that DART keeps, and whether the scores were finite."""
    layout = here.context.layout
    num_text, num_visual = layout.bucket.size
    norms = sum_over_shards(jnp.abs(here.keys.astype(jnp.float32)).sum(axis=(1, 3)))
    slot = jax.lax.broadcasted_iota(jnp.int32, (norms.shape[0], num_visual), 1)
    real = slot < jnp.asarray(layout.num_visual)[:, None]
    seen = jnp.minimum(pruning.pivots_visual, num_kept)
    visual, is_visual = _largest(jnp.where(real, norms[:, num_text:], -jnp.inf), seen, pruning.pivots_visual)
    read = jnp.minimum(pruning.pivots_text, prompts.behind.sum(axis=1))
    text, is_text = _largest(jnp.where(prompts.behind, norms[:, :num_text], -jnp.inf), read, pruning.pivots_text)
    pivots = jnp.concatenate([num_text + visual, text], axis=1)
    is_pivot = jnp.concatenate([is_visual, is_text], axis=1)
    normed = decoder.norm(here.x)
    taken = ((visual[:, :, None] == slot[:, None, :]) & is_visual[:, :, None]).any(axis=1)
    kept = least_similar(normed[:, num_text:], take_rows(normed, pivots), is_pivot, taken, layout, num_kept - seen)
    finite = jnp.isfinite(normed[:, num_text:]).all(axis=2) | ~real
    return kept, jnp.isfinite(norms).all(axis=1) & finite.all(axis=1)


def _largest(
    values: Float[Array, "B slots"], number: Int[Array, " B"], most: int
) -> tuple[Int[Array, "B pivots"], Bool[Array, "B pivots"]]:
    """The slots of each row's `number` largest values, ascending, and which of the entries are used; ties: the lower slot."""
    slots = values.shape[1]
    _, best = jax.lax.top_k(values, min(most, slots))
    rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    best = jnp.sort(jnp.where(rank < number[:, None], best, slots), axis=1)
    return best, best < slots


def _ordinals(kept: Bool[Array, "B P"], capacity: int) -> Int[Array, "B survivors"]:
    slot = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1)
    return jnp.sort(jnp.where(kept, slot, kept.shape[1]), axis=1)[:, :capacity]


def take_rows(x: States, slots: Int[Array, "B rows"]) -> Float[Array, "B rows D"]:
    """Rows of packed states. A slot past the end selects the last row, which serves as padding."""
    return jnp.take_along_axis(x, slots[:, :, None], axis=1, mode="clip")
