"""Where in a model the first number arises that is infinite or undefined: a second, slow pass, when the fast one found any."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from rlens_jax.engine.model_programs import ModelPrograms
from rlens_jax.engine.pools import Batch
from rlens_jax.errors import UserError
from rlens_jax.layout import PADDING_POSITION
from rlens_jax.models.decoder import add_feature
from rlens_jax.models.forward import attend, feed
from rlens_jax.models.layers import all_finite
from rlens_jax.plans import Plan, Reduction


def not_finite(programs: ModelPrograms, batch: Batch, number: int, sample_id: str, plan: Plan, reduction: Reduction) -> UserError:
    """The error for a sample, `number` in its split, whose scores or logits are not finite under a plan.

    Of several processes none can see all weights, so the place is only named where there is one.
    """
    place = "" if jax.process_count() > 1 else f", first in {_origin(programs, batch, number, plan, reduction)}"
    advice = "check the weights" if programs.dtype == np.float32 else "check the weights, or compute in float32"
    return UserError(f"{sample_id}: numbers are infinite or undefined under the plan {plan.label()}{place}; {advice}")


def _origin(programs: ModelPrograms, batch: Batch, number: int, plan: Plan, reduction: Reduction) -> str:
    """The first part of the model whose results are not finite for the rows of a sample."""
    decoder, inputs = programs.model().decoder, batch.inputs
    layout, text = inputs.layout, inputs.layout.bucket.text
    mine = jnp.asarray(inputs.samples) == number
    rows = mine.any(axis=1)
    tokens = rows[:, None] & (jnp.asarray(layout.slots.position) != PADDING_POSITION)
    visual = programs.put(batch.visual)
    x, features = decoder.embed(inputs.text_ids, visual), decoder.features(visual)
    if not _finite(x[:, text:], tokens[:, text:]):
        return "the vision tower or the connector"
    if not _finite(x, tokens):
        return "the embedding"
    context = decoder.context(layout, inputs.rope_positions, jax.random.key(0), features=features)
    stack = nnx.split(decoder.layers)
    for layer in range(decoder.config.num_layers):
        x = attend(stack, jnp.int32(layer), x, context, reduction, plan.level("attention", layer))
        if not _finite(x, tokens):
            return f"the attention of layer {layer}"
        x, kept = feed(stack, jnp.int32(layer), x, context, reduction, plan.level("ffn", layer), None)
        if not _finite(x, tokens) or not bool((kept.scored | ~rows).all()):
            return f"the FFN of layer {layer}"
        x = add_feature(x, context, layer)
        if not _finite(x, tokens):
            return f"the deepstack feature of layer {layer}"
    last = jnp.take_along_axis(x, jnp.asarray(inputs.prompt_end)[:, :, None], axis=1)
    if not bool((all_finite(decoder.logits(last)) | ~mine).all()):
        return "the last norm or the head"
    return "the tokens of the answer"


def _finite(x: Float[Array, "B T D"], tokens: Bool[Array, "B T"]) -> bool:
    """Whether the states of these tokens are finite."""
    return bool(np.asarray((jnp.isfinite(x).all(axis=-1) | ~tokens).all()))
