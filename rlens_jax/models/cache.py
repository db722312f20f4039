"""The KV cache of a generation, of which each layer takes as much as it holds tokens.

Where visual tokens are dropped between layers, later layers hold fewer. The slots of all layers lie one after the other in one
array, and where each layer begins and ends is data. So one compiled decoding program serves the dense model, all plans, and all
ways of pruning whose caches are equally long in all; lengths are rounded up to eighths of the dense cache (our decision). A layer
reads a window of the array. Windows have a few static widths, so that a short layer reads little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlens_jax.layout import PADDING_POSITION, Slots, visible
from rlens_jax.ops.attention import masked_attention
from rlens_jax.pytrees import pytree

PARTS = 8
"""A cache has so many eighths of the dense one, rounded up."""
WINDOWS = (4, 2, 1)
"""A window is the longest layer divided by one of these."""


@dataclass(frozen=True)
class Newest:
    """The newest token of each branch."""

    slots: Slots
    room: Int[Array, ""]
    """Free slots at the end of each layer; the newest tokens go into the first of them."""
    longest: int
    """No layer has more slots."""


@pytree
class KVCache:
    """Rotated keys, and values, layer after layer: of each, the slots of the prefill and then those of new tokens."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    position: Int[Array, "B S"]
    """Sequence position of each slot."""
    branch: Int[Array, "B S"]
    """Its branch, 0 for the trunk."""
    shift: Int[Array, "B L"]
    """By how much new tokens stand earlier in a layer than in the whole prompt, if what was pruned left no gap behind."""
    start: Int[Array, " L"]
    """First slot of each layer."""
    stop: Int[Array, " L"]
    """The slot behind its last one."""

    def with_newest(
        self, k: Float[Array, "B K Q H"], v: Float[Array, "B K Q H"], layer: Int[Array, ""], newest: Newest
    ) -> "KVCache":
        """The cache with the newest tokens of one layer."""
        slot = self.stop[layer] - newest.room
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot)
        return replace(
            self,
            k=put(self.k, k, axis=2),
            v=put(self.v, v, axis=2),
            position=put(self.position, newest.slots.position, axis=1),
            branch=put(self.branch, newest.slots.branch, axis=1),
        )

    def attend(self, q: Float[Array, "B N Q H"], layer: Int[Array, ""], newest: Newest) -> Float[Array, "B N Q H"]:
        """What the newest tokens, which are in the cache already, attend to in one layer."""
        start, stop = self.start[layer], self.stop[layer]

        def attended(width: int) -> Float[Array, "B N Q H"]:
            first = jnp.minimum(start, self.k.shape[2] - width)

            def cut(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, first, width, axis)

            position, slot = cut(self.position, 1), first + jnp.arange(width, dtype=jnp.int32)
            key = Slots(position, jnp.full_like(position, -1), cut(self.branch, 1))
            mine = ((slot >= start) & (slot < stop))[None, None]  # the others are of the layers around
            return masked_attention(q, cut(self.k, 2), cut(self.v, 2), visible(newest.slots, key, None) & mine)

        widths = windows(newest.longest)
        number = jnp.searchsorted(jnp.asarray(widths), stop - start)
        return jax.lax.switch(number, [partial(attended, width) for width in widths])


def windows(longest: int) -> list[int]:
    """Widths of windows, ascending, for layers of at most `longest` slots."""
    return sorted({-(-longest // parts) for parts in WINDOWS})


def cache_of(
    k: Float[Array, "L B K T H"],
    v: Float[Array, "L B K T H"],
    slots: Slots,
    new_tokens: int,
    shift: Int[Array, " B"] | None = None,
) -> KVCache:
    """The cache of layers that hold the same tokens, in `slots`, with room for `new_tokens` more in each."""
    num_layers, batch, _, num_slots, _ = k.shape
    length = num_slots + new_tokens

    def row(values: Int[Array, "B T"], free: int) -> Int[Array, "B S"]:
        return jnp.tile(jnp.pad(values, ((0, 0), (0, new_tokens)), constant_values=free), (1, num_layers))

    def chain(x: Float[Array, "L B K T H"]) -> Float[Array, "B K S H"]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new_tokens), (0, 0))).transpose(1, 2, 0, 3, 4)
        return x.reshape(*x.shape[:2], num_layers * length, x.shape[4])

    start = jnp.arange(num_layers, dtype=jnp.int32) * length
    shift = jnp.zeros(batch, jnp.int32) if shift is None else shift
    shifts = jnp.broadcast_to(shift[:, None], (batch, num_layers))
    return KVCache(chain(k), chain(v), row(slots.position, PADDING_POSITION), row(slots.branch, 0), shifts, start, start + length)


def join_caches(caches: Sequence[KVCache], longest: int) -> KVCache:
    """The caches of consecutive layers as one. Its length is a number of eighths of a cache with `longest` slots per layer."""
    offsets = np.cumsum([0, *(cache.k.shape[2] for cache in caches)])
    num_layers = sum(cache.start.shape[0] for cache in caches)
    part = -(-num_layers * longest // PARTS)
    spare = -(-max(int(offsets[-1]), longest) // part) * part - int(offsets[-1])  # no window is wider than the array

    def chain(name: str, axis: int, free: int = 0) -> Array:
        joined = jnp.concatenate([getattr(cache, name) for cache in caches], axis)
        return jnp.pad(joined, [(0, spare if at == axis else 0) for at in range(joined.ndim)], constant_values=free)

    def layers(name: str) -> Int[Array, " L"]:
        moved = [getattr(cache, name) + jnp.int32(offset) for cache, offset in zip(caches, offsets, strict=False)]
        return jnp.concatenate(moved)

    return KVCache(
        chain("k", 2),
        chain("v", 2),
        chain("position", 1, PADDING_POSITION),
        chain("branch", 1),
        jnp.concatenate([cache.shift for cache in caches], axis=1),
        layers("start"),
        layers("stop"),
    )
