"""A prefill with token pruning: fewer visual tokens enter the first layer, or they are dropped between two layers.

Where tokens are dropped, the survivors are gathered into a smaller bucket that holds those of any sample. Later layers, reduced
or not, run in this bucket: nothing is computed or cached for dropped tokens. Text slots stay where they are.

Additional axis words: `survivors`, the slots for surviving visual tokens; `slots`, chosen packed slots.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.kept_tokens import Selection
from rlens_jax.layout import TokenLayout, keep_visual, visible
from rlens_jax.models.decoder import Context, Decoder, LayerRecord, States, TracedPlan, join_records
from rlens_jax.models.early_pruning import survivors
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.attention import Kernel
from rlens_jax.ops.token_pruning import attention_received, most_attended, num_survivors
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import VTW, FastV, Folder, Pruning


class Part(NamedTuple):
    """Consecutive layers of a prefill that hold the same tokens."""

    record: LayerRecord
    layout: TokenLayout


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

    FastV chooses tokens by the last token of the *prompt* in both cases, so that an answer is scored with the tokens that
    generation would see. With token pruning, a row has one prompt.

    Raises:
        UserError: the pruned layer does not exist.
    """
    layout, rope = batch.layout, jnp.asarray(batch.rope_positions)
    scored: Bool[Array, " B"] | bool = True
    if isinstance(pruning, Folder | Selection) and layout.bucket.visual:
        visual, ordinals, num_kept, scored = survivors(decoder, visual, batch, pruning, random_key)
        rope = jnp.take_along_axis(rope, _slots(layout, ordinals)[:, None], axis=2, mode="clip")
        layout = keep_visual(layout, ordinals, num_kept)
    context = decoder.context(layout, rope, random_key, kernel, chunk, decoder.features(visual))
    x = decoder.embed(batch.text_ids, visual)
    if isinstance(pruning, FastV | VTW):
        pruning.validate(decoder.config.num_layers)
        return _prefill_pruned(decoder, x, context, plan, reduction, pruning, jnp.asarray(batch.prompt_end)[:, 0])
    x, record = decoder.prefill(x, context, plan, reduction)
    return PromptStates(x, (Part(record, layout),), record.kept.scored.all(axis=0) & scored)


def _prefill_pruned(
    decoder: Decoder,
    x: States,
    context: Context,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    pruning: FastV | VTW,
    query_slot: Int[Array, " B"],
) -> PromptStates:
    """All layers; visual tokens are dropped after `pruning.layer` layers. FastV's query is in text slot `query_slot`."""
    layout = context.layout
    num_kept = num_survivors(layout, pruning)
    if isinstance(pruning, FastV):
        x, early, received = _scored_layers(decoder, x, context, plan, reduction, pruning.layer, query_slot)
        ordinals = most_attended(received[:, layout.bucket.text :], layout, num_kept, pruning.kept(layout.bucket.visual))
        scored = jnp.isfinite(received).all(axis=1)
    else:
        x, early = decoder.prefill(x, context, plan, reduction, range(pruning.layer))
        ordinals, scored = jnp.zeros((x.shape[0], 0), jnp.int32), jnp.ones(x.shape[0], bool)
    slots = _slots(layout, ordinals)
    x, cos, sin = (_take(part, slots) for part in (x, *context.rotary))
    survivors = keep_visual(layout, ordinals, num_kept)
    features = None if context.features is None else _take(context.features, ordinals)
    context = replace(context, layout=survivors, rotary=(cos, sin), features=features)
    # Both reductions are the identity without visual tokens.
    rest = plan if survivors.bucket.visual else Plan()
    x, late = decoder.prefill(x, context, rest, reduction, range(pruning.layer, decoder.config.num_layers))
    scored &= early.kept.scored.all(axis=0) & late.kept.scored.all(axis=0)
    return PromptStates(x, (Part(early, layout), Part(late, survivors)), scored)


def _scored_layers(
    decoder: Decoder,
    x: States,
    context: Context,
    plan: Plan | TracedPlan,
    reduction: Reduction,
    num_layers: int,
    query_slot: Int[Array, " B"],
) -> tuple[States, LayerRecord, Float[Array, "B T"]]:
    """The first layers: states, records, and the attention that all tokens receive from one text token in the last of them.

    Text sees all earlier tokens, in a hollow layer too. The layer computes this row of weights inside its kernel, so the row is
    computed again here.
    """
    last, records = num_layers - 1, []
    if last:
        x, record = decoder.prefill(x, context, plan, reduction, range(last))
        records.append(record)
    row, module = query_slot[:, None], decoder.layer(last)
    x_query, cos, sin = (_take(part, row) for part in (x, *context.rotary))
    q, _, _ = module.attention.project(module.input_norm(x_query), (cos, sin))
    x, record = decoder.prefill(x, context, plan, reduction, range(last, num_layers))
    records.append(record)
    key = context.layout.slots
    query = key.cut(lambda x: jnp.take_along_axis(x, row, axis=1))
    received = attention_received(q[:, :, 0], record.k[-1], visible(query, key, None)[:, 0])
    return x, join_records(records), received


def _slots(layout: TokenLayout, ordinals: Int[Array, "B survivors"]) -> Int[Array, "B slots"]:
    """Packed slots of all text, and of the visual tokens with these ordinals."""
    text = jax.lax.broadcasted_iota(jnp.int32, layout.text_position.shape, 1)
    return jnp.concatenate([text, layout.bucket.text + ordinals], axis=1)


def _take(x: Float[Array, "B T width"], slots: Int[Array, "B slots"]) -> Float[Array, "B slots width"]:
    """Rows of packed states. A slot past the end selects the last row, which serves as padding."""
    return jnp.take_along_axis(x, slots[:, :, None], axis=1, mode="clip")
