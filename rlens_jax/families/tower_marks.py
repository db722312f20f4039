"""What the attention in a tower says of its patches, for the baselines that choose visual tokens by it.

The *marks* of a patch are float32 numbers: the attention that it receives in the block before the last, mean over heads, and
behind it its key there, mean over heads. A family maps the marks of patches to visual tokens as it maps the patches, and puts
them behind the numbers of each token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlens_jax.models.decoder import layer_at
from rlens_jax.ops.attention import MASKED

Heads = Float[Array, "I N J H"]
Marks = Float[Array, "I J marks"]
BLOCK = 512
"""Max queries whose weights are in memory at a time."""


def marked_layer(depth: int) -> int:
    """The number of the block, of `depth`, by whose attention patches are marked: the one before the last."""
    return max(0, depth - 2)


def tower_layer(layers: nnx.Module, number: int) -> Any:
    """One of stacked layers, of the class of the stack."""
    graph, stack = nnx.split(layers)
    return nnx.merge(graph, layer_at(stack, number))


def class_token_marks(q: Float[Array, "I N one H"], k: Float[Array, "I N J_and_class H"]) -> Marks:
    """Marks by the attention of the class token, whose query is `q` and whose key is the first of `k`."""
    weights = jax.nn.softmax(_scores(q, k), axis=-1)
    return _marks(weights[:, :, 0].mean(axis=1)[:, 1:], k[:, :, 1:])


def received_marks(q: Heads, k: Heads, group: Int[Array, "I J"], num_patches: Int[Array, " I"]) -> Marks:
    """Marks by the attention from all patches of the image, mean over them.

    A patch attends to those with its `group`, a number from 0 on. Weights are made in blocks of queries and never all at once.
    """
    images, heads, patches, width = q.shape
    count = -(-patches // BLOCK)
    size = -(-patches // count)
    room = count * size - patches
    blocks = jnp.pad(q, ((0, 0), (0, 0), (0, room), (0, 0))).reshape(images, heads, count, size, width)
    groups = jnp.pad(group, ((0, 0), (0, room)), constant_values=-1).reshape(images, count, size)

    def add(total: Float[Array, "I J"], block: tuple[Array, Array]) -> tuple[Float[Array, "I J"], None]:
        queries, own = block
        sees = (own[:, :, None] == group[:, None, :])[:, None]
        weights = jax.nn.softmax(jnp.where(sees, _scores(queries, k), jnp.float32(MASKED)), axis=-1)
        return total + jnp.where(sees, weights, 0.0).sum(axis=(1, 2)), None

    start = jnp.zeros((images, patches), jnp.float32)
    total, _ = jax.lax.scan(add, start, (jnp.moveaxis(blocks, 2, 0), jnp.moveaxis(groups, 1, 0)))
    return _marks(total / (heads * num_patches.astype(jnp.float32))[:, None], k)


def merged_marks(marks: Marks, group: int) -> Float[Array, "I Z marks"]:
    """The marks of visual tokens that are made of `group` consecutive patches each: means."""
    images, patches, width = marks.shape
    return marks.reshape(images, patches // group, group, width).mean(axis=2)


def with_marks(tokens: Float[Array, "I Z D"], marks: Float[Array, "I Z marks"]) -> Float[Array, "I Z D_and_marks"]:
    """Visual tokens, in float32, and behind each one its marks."""
    return jnp.concatenate([tokens.astype(jnp.float32), marks], axis=-1)


def _scores(q: Float[Array, "I N T H"], k: Float[Array, "I N S H"]) -> Float[Array, "I N T S"]:
    return jnp.einsum("INTH,INSH->INTS", q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, preferred_element_type=jnp.float32)


def _marks(score: Float[Array, "I J"], k: Heads) -> Marks:
    return jnp.concatenate([score[..., None], k.astype(jnp.float32).mean(axis=1)], axis=-1)
