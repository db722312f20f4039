"""Where the redundancy of single samples is: which FFN units their visual tokens need, and what their text attends to.

Measured on the dense model, layer by layer, one sample at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rlens_jax.layout import visible
from rlens_jax.models.decoder import Context, Layer, States, add_feature, layer_at
from rlens_jax.models.forward import Stack, VisionLanguageModel, encode, pack
from rlens_jax.models.prompt import Grid, ImageTokens, PreparedImage, Prompt
from rlens_jax.ops.attention import MASKED
from rlens_jax.ops.ffn import best_units, hidden_units, probe_slots, unit_scores
from rlens_jax.plans import FULL, Reduction


@dataclass(frozen=True)
class Seen:
    """What one sample shows.

    Attributes:
        attention: float32[L], the share of the attention of the text behind the images, mean over it and the heads, that goes to
            visual tokens.
        attention_map: float32[P], the same by visual token, mean over the layers.
        kept: int32[L, U], the units that the probes choose.
        survival_map: float32[P], the share of a token's activation |H| that is in these units, mean over the layers.
    """

    attention: np.ndarray
    attention_map: np.ndarray
    kept: np.ndarray
    survival_map: np.ndarray


def see(model: VisionLanguageModel, images: Sequence[PreparedImage], prompt: Prompt, reduction: Reduction) -> Seen:
    """One sample with visual tokens; its units are chosen as a Dynamic FFN of `reduction` would choose them."""
    decoder, batch = model.decoder, pack([prompt])
    visual = encode(model, [images], batch.layout.bucket.visual)
    x = decoder.embed(batch.text_ids, visual)
    context = decoder.context(batch.layout, batch.rope_positions, jax.random.key(0), features=decoder.features(visual))
    stack, parts = nnx.split(decoder.layers), []
    for layer in range(decoder.config.num_layers):
        x, *part = _layer(stack, layer, x, context, reduction)
        x = add_feature(x, context, layer)
        parts.append([np.asarray(each)[0] for each in part])
    attended, kept, survival = map(np.stack, zip(*parts, strict=True))
    return Seen(attended.sum(axis=1), attended.mean(axis=0), kept, survival.mean(axis=0))


@partial(jax.jit, static_argnames=("reduction",))
def _layer(
    stack: Stack, layer: Layer, x: States, context: Context, reduction: Reduction
) -> tuple[States, Float[Array, "B P"], Int[Array, "B U"], Float[Array, "B P"]]:
    """The dense layer; the attention that visual tokens get; the units that are kept, and each token's share in them."""
    module, layout = nnx.merge(*layer_at(stack, layer)), context.layout
    num_text = layout.bucket.text
    q, k, _ = module.attention.project(module.input_norm(x), context.rotary)
    attended = _attention_of_text(q[:, :, :num_text], k, context)
    x = module.attend(x, context, reduction, FULL)[0]
    hidden = hidden_units(module.ffn_norm(x)[:, num_text:], module.ffn.weights)
    slots, is_probe = probe_slots(layout, reduction, jax.random.fold_in(context.random_key, layer))
    scores = unit_scores(jnp.take_along_axis(hidden, slots[:, :, None], axis=1), is_probe)
    kept = best_units(scores, reduction.kept_units(module.ffn.weights.number))
    size = jnp.abs(hidden.astype(jnp.float32))
    survives = jnp.take_along_axis(size, kept.units[:, None], axis=2).sum(axis=2) / jnp.maximum(size.sum(axis=2), 1e-30)
    return module.feed(x, context, reduction, FULL, layer)[0], attended, kept.units, survives


def _attention_of_text(q: Float[Array, "B N X H"], k: Float[Array, "B K T H"], context: Context) -> Float[Array, "B P"]:
    """The attention of the text behind the last visual token to each visual token, mean over that text and all heads."""
    layout = context.layout
    num_text, key = layout.bucket.text, layout.slots
    sees = visible(key.cut(lambda values: values[:, :num_text]), key, None)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, num_text, q.shape[3]) * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
    scores = jnp.einsum("BKGXH,BKTH->BKGXT", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, jnp.float32(MASKED)), axis=-1).mean(axis=(1, 2))
    ordinal = jnp.arange(layout.bucket.visual)[None]
    last = jnp.where(ordinal < layout.num_visual[:, None], layout.visual_position, -1).max(axis=1, keepdims=True)
    behind = (layout.text_position > last) & (jnp.arange(num_text)[None] < layout.num_text[:, None])
    mean = jnp.where(behind[:, :, None], weights[:, :, num_text:], 0.0).sum(axis=1)
    return mean / jnp.maximum(behind.sum(axis=1, keepdims=True), 1).astype(jnp.float32)


def overlaps(kept: Int[np.ndarray, "samples L U"], width: int) -> Float[np.ndarray, "samples samples L"]:
    """The share of the kept units that two samples have in common, by layer; `width` is F."""
    samples, layers, units = kept.shape
    chosen = np.zeros((samples, layers, width), np.float32)
    np.put_along_axis(chosen, kept, 1.0, axis=2)
    return np.einsum("alf,blf->abl", chosen, chosen) / np.float32(units)


def token_grid(tokens: ImageTokens, side: int | None = None) -> Grid | None:
    """Rows and columns of an image's tokens in raster order, None where they are no grid over the whole image.

    Some are a grid of patches merged by squares (Qwen2-VL), others a square of `side` tokens (LLaVA-1.5, one tile of InternVL).
    Several tiles and slices are neither.
    """
    if side is not None and tokens.count == side**2:
        return side, side
    rows, columns = tokens.grid
    merge = isqrt(rows * columns // tokens.count) if tokens.count else 0
    fits = merge and rows % merge == 0 == columns % merge and rows * columns == tokens.count * merge**2
    return (rows // merge, columns // merge) if fits else None
