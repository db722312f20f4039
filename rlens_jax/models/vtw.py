"""After which layer VTW drops the visual tokens: the first at which the answers' distribution hardly changes (arXiv 2405.05803).

The authors withdraw after every layer in turn, on a few samples (20 in their example), and compare the distribution of the first
new token with the dense model's: the first layer whose mean divergence is below a threshold is chosen. Their code compares from
layer 5 on; here all layers are (our decision). As in their code it is KL(withdrawn || dense).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlens_jax.errors import UserError
from rlens_jax.layout import keep_visual
from rlens_jax.models import vocabulary
from rlens_jax.models.decoder import Context, Decoder, TracedPlan
from rlens_jax.models.prompt import PromptBatch
from rlens_jax.ops.attention import Kernel
from rlens_jax.plan import Reduction
from rlens_jax.pruning import VTW


def withdrawal_divergences(
    decoder: Decoder,
    visual: Float[Array, "B P D"],
    batch: PromptBatch,
    plan: TracedPlan,
    reduction: Reduction,
    random_key: Array,
    kernel: Kernel = "packed",
) -> Float[Array, "L B"]:
    """KL in nats of the next token's distribution when visual tokens are dropped after 1, 2, .. L layers; the last is 0.

    Both sides run under the plan, whose reductions do nothing where no visual token is left.
    """
    num_layers, num_text = decoder.config.num_layers, batch.layout.bucket.text
    context = decoder.context(batch.layout, batch.rope_positions, random_key, kernel)
    none = jnp.zeros((visual.shape[0], 0), jnp.int32)
    text_layout = keep_visual(batch.layout, none, jnp.zeros(visual.shape[0], jnp.int32))
    cos, sin = (part[:, :num_text] for part in context.turn)
    text_context = Context(text_layout, (cos, sin), random_key, kernel)
    nothing = TracedPlan(jnp.zeros(num_layers, bool), jnp.zeros(num_layers, bool))
    last = batch.last_prompt_slot[:, None, None]

    def after(x: Array, layer: Array) -> tuple[Array, Array]:
        x, _ = decoder.run_layers(x, context, plan, reduction, layer, layer + 1)
        text = x[:, :num_text]
        text, _ = decoder.run_layers(text, text_context, nothing, reduction, layer + 1, jnp.int32(num_layers))
        return x, decoder.logits(jnp.take_along_axis(text, last, axis=1))[:, 0]

    _, logits = jax.lax.scan(after, decoder.embed(batch.text_ids, visual), jnp.arange(num_layers, dtype=jnp.int32))
    return vocabulary.divergence(logits, logits[-1:])


def choose_vtw_layer(divergences: np.ndarray, threshold: float) -> VTW:
    """The withdrawal after the first layer whose divergence, averaged over samples, is below `threshold`.

    Args:
        divergences: [L, samples], of `withdrawal_divergences`; its last row, of a withdrawal after all layers, is not looked at.
        threshold: in nats.

    Raises:
        UserError: no layer's is.
    """
    means = np.asarray(divergences, np.float64)[:-1].mean(axis=1)
    below = np.flatnonzero(means < threshold)
    if not len(below):
        raise UserError(
            f"after no layer does VTW change the output by less than {threshold:g} nats; the least is {means.min():.3g}, "
            f"after layer {int(means.argmin()) + 1}"
        )
    return VTW(int(below[0]) + 1)
