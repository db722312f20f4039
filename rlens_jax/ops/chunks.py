"""Work on a part of a long axis at a time, so that what a step makes on the way is never there for all of it.

Parts are of equal, static size. The last one overlaps the one before instead of being padded, so some items are computed twice,
to the same values.

Axis letters: B batch, T tokens, D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def parts_of(length: int, most: int) -> tuple[np.ndarray, int]:
    """Starts int32 and size of the fewest equal parts of at most `most` items that cover `length` items."""
    count = -(-length // most)
    size = -(-length // count)
    return np.minimum(np.arange(count, dtype=np.int32) * size, length - size).astype(np.int32), size


def over_tokens(
    function: Callable[[Float[Array, "B t D"]], Float[Array, "B t D"]],
    x: Float[Array, "B T D"],
    chunk: int | None,
) -> Float[Array, "B T D"]:
    """`function`, which treats every token by itself, on at most `chunk` tokens at a time; None is all at once."""
    length = x.shape[1]
    if chunk is None or length <= chunk:
        return function(x)
    starts, size = parts_of(length, chunk)

    def step(y: Array, start: Array) -> tuple[Array, None]:
        part = function(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=1), None

    return jax.lax.scan(step, jnp.zeros_like(x), jnp.asarray(starts))[0]
