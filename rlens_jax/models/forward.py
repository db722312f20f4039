"""The whole model and its forward pass, from images and text to logits under a plan, written to be read.

The comparison with other frameworks (`rlens_jax.parity`) runs this pass. The fast path consists of the same steps under the same
names: the programs of `rlens_jax.engine` encode, embed and run the layers separately, and `Decoder.prefill` and
`Decoder.run_layers` attend and feed in one loop over all layers.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from rlens_jax.layout import Bucket, unpack_rows
from rlens_jax.models.decoder import (
    Context,
    Decoder,
    DecoderConfig,
    Imposed,
    Layer,
    States,
    add_feature,
    hold_text_before,
    layer_at,
)
from rlens_jax.models.prompt import PreparedImage, Prompt, PromptBatch, collate_alone
from rlens_jax.ops.ffn import Kept
from rlens_jax.plans import Level, Operator, Plan, Reduction

Stack: TypeAlias = PyTree
"""All decoder layers as `nnx.split` returns them: their module graph, and their parameters with a leading axis L."""
Images: TypeAlias = Sequence[Sequence[PreparedImage]]
"""The prepared images of each sample, in order."""
Observer = Callable[[int, Operator, States, Kept | None], None]
"""Called as `observe(layer, operator, states, kept)` after each half of a layer; `kept` is what the probes of an FFN chose."""
DEFAULT = Reduction()


@runtime_checkable
class TowerConfig(Protocol):
    """Sizes of a vision tower, as far as all families have them."""

    @property
    def depth(self) -> int:
        """Number of layers."""


@runtime_checkable
class FamilyConfig(Protocol):
    """Sizes and constants of a model, as far as all families have them."""

    @property
    def decoder(self) -> DecoderConfig: ...

    @property
    def vision(self) -> TowerConfig: ...


class VisionLanguageModel(nnx.Module):
    """A model of any family.

    Attributes:
        vision: from the arrays of prepared images (`PreparedImage`, stacked) to their visual tokens, padded. With deepstack, each
            token is followed by its features, so it has `DecoderConfig.visual_width` numbers.
        decoder: from text and visual tokens to logits.
    """

    def __init__(self, vision: Callable[..., Float[Array, "I Z visual_width"]], decoder: Decoder):
        self.vision = vision
        self.decoder = decoder


def forward(
    model: VisionLanguageModel,
    images: Images,
    prompts: Sequence[Prompt],
    plan: Plan,
    reduction: Reduction = DEFAULT,
    imposed: Mapping[int, Int[np.ndarray, "B U"]] = MappingProxyType({}),
    observe: Observer = lambda layer, operator, states, kept: None,
) -> list[Float[np.ndarray, "T_i V"]]:
    """Logits of all tokens of each sample, where each layer does for visual tokens what `plan` says.

    `imposed` replaces the units that the probes choose, by layer; `observe` sees the states after each half of a layer.
    """
    decoder, batch = model.decoder, pack(prompts)
    visual = encode(model, images, batch.layout.bucket.visual)
    x = decoder.embed(batch.text_ids, visual)  # each row: all text tokens, then all visual tokens
    context = decoder.context(batch.layout, batch.rope_positions, jax.random.key(0), features=decoder.features(visual))
    stack = nnx.split(decoder.layers)
    for layer in range(decoder.config.num_layers):
        entering = x
        x = attend(stack, layer, x, context, reduction, plan.level("attention", layer))
        observe(layer, "attention", x, None)
        x, kept = feed(stack, layer, x, context, reduction, plan.level("ffn", layer), imposed.get(layer))
        if plan.freeze_text_before and layer in plan.frozen:
            x = hold_text_before(x, entering, batch.layout)
        observe(layer, "ffn", x, kept)
        x = add_feature(x, context, layer)
    return unpack_rows(np.asarray(decoder.logits(x)), batch.layout)


@partial(jax.jit, static_argnames=("reduction", "level"))
def attend(stack: Stack, layer: Layer, x: States, context: Context, reduction: Reduction, level: Level) -> States:
    """Add attention. The level says which tokens before it a visual token attends to; its keys and values are always made."""
    return nnx.merge(*layer_at(stack, layer)).attend(x, context, reduction, level)[0]


@partial(jax.jit, static_argnames=("reduction", "level"))
def feed(
    stack: Stack, layer: Layer, x: States, context: Context, reduction: Reduction, level: Level, imposed: Imposed
) -> tuple[States, Kept]:
    """Add the FFN. By its level, the visual tokens of a sample use all units, those that its probes activate most, or none."""
    return nnx.merge(*layer_at(stack, layer)).feed(x, context, reduction, level, layer, imposed)


def encode(model: VisionLanguageModel, images: Images, num_slots: int) -> Float[Array, "B P visual_width"]:
    """Visual tokens of each sample: its images in order, then zeros. Images of equal shapes go through the tower together."""
    vision, same_shape = nnx.split(model.vision), defaultdict(list)
    visual = np.zeros((len(images), num_slots, model.decoder.config.visual_width), model.decoder.embedding.dtype)
    for row, sample in zip(visual, images, strict=True):
        start = 0
        for image in sample:
            slots = row[start : start + image.tokens.count]  # a view into `visual`
            same_shape[tuple(array.shape for array in image.arrays)].append((image.arrays, slots))
            start += image.tokens.count
    for group in same_shape.values():
        arrays, slots_of_images = zip(*group, strict=True)
        encoded = run_vision(vision, *map(np.stack, zip(*arrays, strict=True)))
        for slots, tokens in zip(slots_of_images, np.asarray(encoded), strict=True):
            slots[:] = tokens[: len(slots)]  # the tower pads each image
    return jnp.asarray(visual)


@jax.jit
def run_vision(vision: PyTree, *arrays: Array) -> Float[Array, "I Z visual_width"]:
    """Tower and connector."""
    return nnx.merge(*vision)(*arrays)


def pack(prompts: Sequence[Prompt]) -> PromptBatch:
    """One batch on the device, in the smallest bucket that holds every prompt."""
    bucket = Bucket(max([1, *(p.num_text for p in prompts)]), max([1, *(p.num_visual for p in prompts)]))
    return jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, max(p.answer_length for p in prompts)))
