"""Our model on the inputs of a case, half a layer at a time, so that its states can be looked at on the way.

Axis letters: B samples, T packed slots, D width, U kept units, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rlens_jax.families.reference_rows import Row
from rlens_jax.layout import Bucket, unpack_rows
from rlens_jax.models.decoder import Context
from rlens_jax.models.prompt import PromptBatch, collate
from rlens_jax.plan import Reduction


class Forward:
    """One batch on its way through a model.

    Args:
        model: a family's module with `vision` and `decoder`.
        rows: the samples.
        reduction: how reduced layers treat visual tokens.
    """

    def __init__(self, model: Any, rows: Sequence[Row], reduction: Reduction):
        prompts = [row.prompt for row in rows]
        bucket = Bucket(
            text=max(1, *(prompt.num_text for prompt in prompts), 1),
            visual=max(1, *(prompt.num_visual for prompt in prompts), 1),
        )
        self._model = model
        self._reduction = reduction
        self.batch = collate(prompts, range(len(rows)), bucket, 1)
        self._on_device: PromptBatch = jax.tree.map(jnp.asarray, self.batch)
        decoder = model.decoder
        self._context = decoder.context(self._on_device.layout, self._on_device.rope_positions, jax.random.key(0))
        self._graph, self._stack = nnx.split(decoder.layers)
        self._visual = _encode(model, rows, bucket.visual, decoder.config.width)

    def embedded(self) -> Float[Array, "B T D"]:
        """The states before the first layer."""
        return self._model.decoder.embed(self._on_device.text_ids, jnp.asarray(self._visual))

    def attend(self, x: Float[Array, "B T D"], layer: int, hollow: bool) -> Float[Array, "B T D"]:
        """The states after a layer's attention."""
        return _attend(self._graph, self._stack, jnp.int32(layer), x, self._context, self._reduction, hollow)

    def feed(
        self, x: Float[Array, "B T D"], layer: int, dynamic: bool, imposed: Int[np.ndarray, "B U"] | None
    ) -> tuple[Float[Array, "B T D"], Int[np.ndarray, "B U"]]:
        """The states after a layer's FFN, and the units that our probes choose."""
        units = None if imposed is None else jnp.asarray(imposed, jnp.int32)
        x, kept = _feed(self._graph, self._stack, jnp.int32(layer), x, self._context, self._reduction, dynamic, units)
        return x, np.asarray(kept)

    def rows(self, x: Float[Array, "B T D"]) -> list[Float[np.ndarray, "T_i D"]]:
        """States in sequence order, without padding, as float32."""
        return unpack_rows(np.asarray(x).astype(np.float32), self.batch.layout)

    def logits(self, x: Float[Array, "B T D"]) -> list[Float[np.ndarray, "T_i V"]]:
        """Logits in sequence order, without padding."""
        return unpack_rows(np.asarray(self._model.decoder.logits(x)), self.batch.layout)


@partial(jax.jit, static_argnames=("graph", "reduction", "hollow"))
def _attend(
    graph: Any, stack: Any, layer: Array, x: Array, context: Context, reduction: Reduction, hollow: bool
) -> Array:
    module = nnx.merge(graph, jax.tree.map(lambda p: p[layer], stack))
    return module.attend(x, context, reduction, hollow)[0]


@partial(jax.jit, static_argnames=("graph", "reduction", "dynamic"))
def _feed(
    graph: Any,
    stack: Any,
    layer: Array,
    x: Array,
    context: Context,
    reduction: Reduction,
    dynamic: bool,
    imposed: Array | None,
) -> tuple[Array, Array]:
    module = nnx.merge(graph, jax.tree.map(lambda p: p[layer], stack))
    x, kept = module.feed(x, context, reduction, dynamic, layer, imposed)
    return x, kept.units


@partial(jax.jit, static_argnames="graph")
def _vision(graph: Any, state: Any, *arrays: Array) -> Array:
    return nnx.merge(graph, state)(*arrays)


def _encode(model: Any, rows: Sequence[Row], slots: int, width: int) -> np.ndarray:
    """Visual tokens of all samples [B, P, D]; images of equal shapes go through the tower together."""
    encoded: list[list[Any]] = [[None] * len(row.images) for row in rows]
    by_shape: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.images):
            by_shape[tuple(array.shape for array in image.arrays)].append((i, j))
    graph, state = nnx.split(model.vision)
    for places in by_shape.values():
        images = [rows[i].images[j] for i, j in places]
        stacked = [np.stack(arrays) for arrays in zip(*(image.arrays for image in images), strict=True)]
        tokens = np.asarray(_vision(graph, state, *stacked))
        for (i, j), found in zip(places, tokens, strict=True):
            encoded[i][j] = found[: rows[i].images[j].num_tokens]
    dtype = model.decoder.embedding[...].dtype
    packed = np.zeros((len(rows), slots, width), dtype)
    for sample, parts in zip(packed, encoded, strict=True):
        if parts:
            joined = np.concatenate(parts)
            sample[: len(joined)] = joined
    return packed
