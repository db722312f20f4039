"""A prefill with token pruning: fewer visual tokens enter the first layer, or they are dropped between layers.

Where tokens are dropped, the survivors are gathered into a smaller bucket that holds those of any sample. Later layers, reduced
or not, run in this bucket: nothing is computed or cached for dropped tokens. Text slots stay where they are. Which tokens stay
is decided in `rlens_jax.models.drop_choice`.

Additional axis words: `survivors`, the slots for surviving visual tokens; `slots`, chosen packed slots.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.drops import Stage
from rlens_jax.kept_tokens import Selection
from rlens_jax.layout import TokenLayout, keep_visual
from rlens_jax.models.decoder import Context, Decoder, LayerRecord, States, TracedPlan, join_records
from rlens_jax.models.drop_choice import Choice, Dropping, Here, choose, look_at, take_rows
from rlens_jax.models.early_pruning import survivors
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.attention import Kernel
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import Folder, Pruning, decoder_stages


class Part(NamedTuple):
    """Consecutive layers of a prefill that hold the same tokens."""

    record: LayerRecord
    layout: TokenLayout
    shift: Int[Array, " B"]
    """As `KVCache.shift`."""


class PromptStates(NamedTuple):
    """The result of a prefill."""

    x: States
    """The last states, packed by the last part's layout; text slots are those of the batch."""
    parts: tuple[Part, ...]
    scored: Bool[Array, " B"]
    """Whether all scores of probes and of pruned tokens were finite."""


def run_prompt(
    decoder: Decoder,
    visual: Float[Array, "B P visual_width"],
    batch: PromptBatch,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    random_key: Array,
    kernel: Kernel = "packed",
    pruning: Pruning | None = None,
    chunk: int | None = None,
) -> PromptStates:
    """All layers over prompts, with or without answers after them.

    With token pruning, a row has one prompt.

    Raises:
        UserError: a layer to prune after does not exist.
    """
    layout, rope = batch.layout, jnp.asarray(batch.rope_positions)
    shift, scored = jnp.zeros(visual.shape[0], jnp.int32), jnp.ones(visual.shape[0], bool)
    if isinstance(pruning, Folder | Selection) and layout.bucket.visual:
        visual, ordinals, num_kept, scored = survivors(decoder, visual, batch, pruning, random_key)
        rope = jnp.take_along_axis(rope, _slots(layout, ordinals)[:, None], axis=2, mode="clip")
        whole, layout = layout, keep_visual(layout, ordinals, num_kept)
        if isinstance(pruning, Selection) and pruning.positions == "renumbered":
            rope, shift = layout.slots.position[:, None], jnp.asarray(whole.num_visual) - num_kept
    context = decoder.context(layout, rope, random_key, kernel, chunk, decoder.features(visual))
    x = decoder.embed(batch.text_ids, visual)
    if isinstance(pruning, Dropping):
        return _run_parts(decoder, x, context, plan, reduction, pruning, batch)
    x, record = decoder.prefill(x, context, plan, reduction)
    return PromptStates(x, (Part(record, layout, shift),), record.kept.scored.all(axis=0) & scored)


def _run_parts(
    decoder: Decoder,
    x: States,
    context: Context,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    pruning: Dropping,
    batch: PromptBatch,
) -> PromptStates:
    """All layers, in parts between which visual tokens are dropped."""
    num_layers, first = decoder.config.num_layers, 0
    prompts = look_at(batch, x, context.layout)
    parts, shift, scored = [], jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0], bool)
    for step, stage in enumerate(decoder_stages(pruning, num_layers)):
        record, here = _layers_until(decoder, x, context, plan, reduction, first, stage)
        choice = choose(decoder, pruning, step, stage, prompts, here)
        parts.append(Part(record, context.layout, shift))
        scored &= record.kept.scored.all(axis=0) & choice.finite
        x, context = _keep(decoder, context, choice, pruning)
        if pruning.positions == "renumbered":
            shift = prompts.num_visual - choice.num_kept
        if not context.layout.bucket.visual:
            plan = Plan()  # both reductions are the identity without visual tokens
        first = stage.layer
    x, record = decoder.prefill(x, context, plan, reduction, range(first, num_layers))
    parts.append(Part(record, context.layout, shift))
    return PromptStates(x, tuple(parts), scored & record.kept.scored.all(axis=0))


def _layers_until(
    decoder: Decoder, x: States, context: Context, plan: Plan | TracedPlan, reduction: Reduction, first: int, stage: Stage
) -> tuple[LayerRecord, Here]:
    """The layers from number `first` to a drop: their records, and what a method may look at."""
    last, records = stage.layer - 1, []
    if last > first:
        x, record = decoder.prefill(x, context, plan, reduction, range(first, last))
        records.append(record)
    entering = x
    x, record = decoder.prefill(x, context, plan, reduction, range(last, stage.layer))
    return join_records([*records, record]), Here(stage.layer, entering, x, record.k[-1], context)


def _keep(decoder: Decoder, context: Context, choice: Choice, pruning: Dropping) -> tuple[States, Context]:
    """States and context of the tokens that stay."""
    layout = context.layout
    slots, survivors = _slots(layout, choice.ordinals), keep_visual(layout, choice.ordinals, choice.num_kept)
    if pruning.positions == "renumbered":
        rotary = decoder.rotary(survivors.slots.position[:, None])
    else:
        cos, sin = (take_rows(part, slots) for part in context.rotary)
        rotary = cos, sin
    features = None if choice.features is None else take_rows(choice.features, choice.ordinals)
    return take_rows(choice.x, slots), replace(context, layout=survivors, rotary=rotary, features=features)


def _slots(layout: TokenLayout, ordinals: Int[Array, "B survivors"]) -> Int[Array, "B slots"]:
    """Packed slots of all text, and of the visual tokens with these ordinals."""
    text = jax.lax.broadcasted_iota(jnp.int32, layout.text_position.shape, 1)
    return jnp.concatenate([text, layout.bucket.text + ordinals], axis=1)
