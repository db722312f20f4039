"""The forward pass, from images and text to logits under a plan, written to be read.

The comparison with other frameworks (`rlens_jax.parity`) runs it. The fast path consists of the same steps under the same names:
the programs of `rlens_jax.engine` encode, embed and run the layers separately, and `Decoder.prefill` and `Decoder.run_layers`
attend and feed in one loop over all layers.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from rlens_jax.layout import Bucket, unpack_rows
from rlens_jax.models.decoder import Context, layer_at
from rlens_jax.models.prompt import PreparedImage, Prompt, PromptBatch, collate
from rlens_jax.models.vision_language import VisionLanguageModel
from rlens_jax.ops.ffn import Kept
from rlens_jax.plan import Operator, Plan, Reduction

Layer = Int[Array, ""]
States = Float[Array, "B T D"]
Chosen = Int[Array, "B U"] | None
Observer = Callable[[int, Operator, States, Kept | None], None]
"""Called as `observe(layer, operator, states, kept)` after each half of a layer; `kept` is what the probes of an FFN chose."""
DEFAULT = Reduction()


def forward(
    model: VisionLanguageModel,
    images: Sequence[Sequence[PreparedImage]],
    text: Sequence[Prompt],
    plan: Plan,
    reduction: Reduction = DEFAULT,
    imposed: Mapping[int, Int[np.ndarray, "B U"]] = MappingProxyType({}),
    observe: Observer = lambda layer, operator, states, kept: None,
) -> list[Float[np.ndarray, "T_i V"]]:
    """Logits of all tokens of each sample, with the layers of `plan` reduced for visual tokens.

    `imposed` replaces the units that the probes choose, by layer; `observe` sees the states on the way.
    """
    decoder, batch = model.decoder, pack(text)
    visual = encode(model, images, batch.layout.bucket.visual)
    x = decoder.embed(batch.text_ids, visual)  # each row: all text tokens, then all visual tokens
    context = decoder.context(batch.layout, batch.rope_positions, jax.random.key(0))
    layers = nnx.split(decoder.layers)
    for layer in range(decoder.config.num_layers):
        x = attend(layers, layer, x, context, reduction, layer in plan.attention)
        observe(layer, "attention", x, None)
        x, kept = feed(layers, layer, x, context, reduction, layer in plan.ffn, imposed.get(layer))
        observe(layer, "ffn", x, kept)
    return unpack_rows(np.asarray(decoder.logits(x)), batch.layout)


@partial(jax.jit, static_argnames=("reduction", "hollow"))
def attend(layers: PyTree, layer: Layer, x: States, context: Context, reduction: Reduction, hollow: bool) -> States:
    """Add attention. If hollow, a visual token attends to the text before it and to the last R visual tokens only."""
    return nnx.merge(*layer_at(layers, layer)).attend(x, context, reduction, hollow)[0]


@partial(jax.jit, static_argnames=("reduction", "dynamic"))
def feed(
    layers: PyTree, layer: Layer, x: States, context: Context, reduction: Reduction, dynamic: bool, imposed: Chosen
) -> tuple[States, Kept]:
    """Add the FFN. If dynamic, the visual tokens of a sample use only the units that its probes activate most."""
    return nnx.merge(*layer_at(layers, layer)).feed(x, context, reduction, dynamic, layer, imposed)


def encode(model: VisionLanguageModel, images: Sequence[Sequence[PreparedImage]], slots: int) -> Float[Array, "B P D"]:
    """Visual tokens of each sample, images in order and zeros behind them; images of equal shapes are encoded together."""
    decoder, vision, alike = model.decoder, nnx.split(model.vision), defaultdict(list)
    packed = np.zeros((len(images), slots, decoder.config.width), decoder.embedding.dtype)
    for row, sample in zip(packed, images, strict=True):
        stops = accumulate(image.tokens.count for image in sample)
        for image, stop in zip(sample, stops, strict=True):
            shapes = tuple(array.shape for array in image.arrays)
            alike[shapes].append((image.arrays, row[stop - image.tokens.count : stop]))
    for group in alike.values():
        arrays, places = zip(*group, strict=True)
        encoded = run_vision(vision, *map(np.stack, zip(*arrays, strict=True)))
        for place, tokens in zip(places, np.asarray(encoded), strict=True):
            place[:] = tokens[: len(place)]
    return jnp.asarray(packed)


@jax.jit
def run_vision(vision: PyTree, *arrays: Array) -> Float[Array, "I Z D"]:
    """Tower and connector."""
    return nnx.merge(*vision)(*arrays)


def pack(text: Sequence[Prompt]) -> PromptBatch:
    """One batch on the device, in the smallest bucket that holds every prompt."""
    bucket = Bucket(max([1, *(p.num_text for p in text)]), max([1, *(p.num_visual for p in text)]))
    return jax.tree.map(jnp.asarray, collate(text, range(len(text)), bucket, max(p.answer_length for p in text)))
