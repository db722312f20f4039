"""A padded batch of examples through our vision module and decoder, for families with plain rotary positions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from rlens_jax.plans import Plan, Reduction
from tests.sequences import bucket_for, unpack

KEY = jax.random.key(0)
SPARE = (2, 3)
"""Text and visual slots more than a batch needs."""


def plain_batch(examples: Sequence[Any]) -> PromptBatch:
    """The prompts as the decoder reads them."""
    prompts = [Prompt.plain(example.token_ids, example.is_visual) for example in examples]
    bucket = bucket_for([example.is_visual for example in examples], SPARE)
    return jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, 1))


@partial(jax.jit, static_argnames=("graph", "plan", "reduction", "new_tokens"))
def _prefill(graph, state, batch, arrays, source, plan: Plan, reduction: Reduction, new_tokens: int):
    """Logits of all slots, were the probe scores numbers, and the cache."""
    model = nnx.merge(graph, state)
    tokens = model.vision(*arrays)
    x = model.decoder.embed(batch.text_ids, tokens.reshape(-1, tokens.shape[-1])[source])
    context = model.decoder.context(batch.layout, batch.rope_positions, KEY)
    x, record = model.decoder.prefill(x, context, plan, reduction)
    cache = model.decoder.make_cache(record, batch.layout, new_tokens)
    return model.decoder.logits(x), record.kept.scored.all(), cache


def prefill(
    model: VisionLanguageModel,
    examples: Sequence[Any],
    arrays: Sequence[Any],
    source: Any,
    plan: Plan,
    reduction: Reduction,
    new_tokens: int = 0,
) -> tuple[list[np.ndarray], Any, PromptBatch]:
    """Logits of all tokens of each example, cache and batch.

    `arrays` are those of all images, `source` [B, P] the index of each visual slot into their flattened visual tokens.
    """
    batch = plain_batch(examples)
    logits, scored, cache = _prefill(*nnx.split(model), batch, arrays, source, plan, reduction, new_tokens)
    assert scored
    return unpack(logits, batch.layout), cache, batch


def greedy(model: VisionLanguageModel, logits: np.ndarray, cache: Any, batch: PromptBatch, new_tokens: int) -> list[int]:
    """Greedy tokens after the prompt of a batch of one, whose logits and cache `prefill` returned."""
    tokens, decode = [int(logits[-1].argmax())], jax.jit(model.decoder.decode)
    for step in range(new_tokens - 1):
        place = batch.next_position + step, (batch.next_rope + step)[:, None, :], jnp.int32(new_tokens - step)
        row, cache = decode(jnp.asarray([tokens[-1:]], jnp.int32), cache, *place)
        tokens.append(int(row[0, 0].argmax()))
    return tokens
