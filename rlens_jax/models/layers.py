"""Building blocks of towers and decoders: linear maps, norms, rotary embeddings, and a vocabulary cut over a mesh.

A parameter is declared in one place: axes, sizes, dtype and initialiser. The axis letters stay with it as metadata and determine
how it is cut over a mesh (`rlens_jax.sharding.mesh`).

Each shard of the mesh's `model` axis holds V consecutive rows of the vocabulary, which is padded to a multiple of the shards. The
logits of padding are `MASKED`. No shard ever holds all logits of a batch.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.ops.attention import MASKED
from rlens_jax.sharding.model_axis import max_over_shards, num_shards, shard_index, stack_shards, sum_over_shards

Sizes = Mapping[str, int]
"""Sizes by axis letter."""
Rotary = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""Cosine and sine of rotary angles, both float32."""


class UnitRows(nnx.Param):
    """FFN units, one row each, which may be stored as half rows (`rlens_jax.ops.ffn_tpu`)."""


def _trailing(parameter: Array, ndim: int) -> Array:
    """`parameter` with leading axes of size 1, up to `ndim` axes."""
    return parameter.reshape((1,) * (ndim - parameter.ndim) + parameter.shape)


class Linear(nnx.Module):
    """`einsum(spec, x, kernel) + bias`. The spec names all axes, as in "BTD,DNH->BTNH"; `bias` names those of the bias."""

    def __init__(
        self, spec: str, sizes: Sizes, *, bias: str = "", kind: type[nnx.Param] = nnx.Param, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        inputs, axes = spec.split("->", maxsplit=1)[0].split(",")
        fan_in = math.prod(sizes[axis] for axis in axes if axis in inputs)
        shape = tuple(sizes[axis] for axis in axes)
        self.spec = spec
        self.kernel = kind(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros([sizes[axis] for axis in bias], dtype), axes=bias) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.einsum(self.spec, x, self.kernel[...])
        return y if self.bias is None else y + _trailing(self.bias[...], y.ndim)


def _inverse_root(x: Float[Array, "*T one"]) -> Float[Array, "*T one"]:
    """1 / sqrt(x); not a number if x is infinite, because 0 would hide that a model overflows."""
    root = jax.lax.rsqrt(x)
    return jnp.where(root > 0, root, jnp.float32(jnp.nan))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * _inverse_root(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * _trailing(self.scale[...], x.ndim)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * _inverse_root(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale, bias = (_trailing(p[...].astype(jnp.float32), x.ndim) for p in (self.scale, self.bias))
        return (x32 * scale + bias).astype(x.dtype)


def rotation(angles: Float[Array, "B T half"]) -> Rotary:
    """Cosine and sine of rotary angles, both float32."""
    return jnp.cos(angles), jnp.sin(angles)


def rope_angles(
    positions: Int[Array | np.ndarray, "B axes T"], theta: float, sections: tuple[int, ...], *, interleaved: bool = False
) -> Float[Array, "B T half"]:
    """Rotary angles of a decoder. Each section of frequencies follows one position axis.

    One section is plain RoPE; Qwen2-VL's mRoPE has three: time, height and width. Sections lie one after another, or
    interleaved (Qwen3-VL): the frequencies then follow the axes in turn, and the first axis where the section of another is full.
    """
    half = sum(sections)
    frequency = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    axis = np.repeat(np.arange(len(sections)), sections)
    if interleaved:
        turn, place = np.arange(half) % len(sections), np.arange(half) // len(sections)
        axis = np.where(place < np.array(sections)[turn], turn, 0)
    return jnp.asarray(positions, jnp.float32).transpose(0, 2, 1)[:, :, axis] * _trailing(frequency, 3)


def rotate(x: Float[Array, "B T N H"], rotary: Rotary) -> Float[Array, "B T N H"]:
    """Rotary embedding by half-rotation (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32."""
    cos, sin = (t[:, :, None, :] for t in rotary)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def embed_tokens(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Embeddings of `ids`, which count the whole vocabulary; each comes from the shard that holds it."""
    if num_shards() == 1:
        return table[ids]
    row, held = _local_rows(ids, table.shape[0])
    return sum_over_shards(jnp.where(held[..., None], table[row], jnp.zeros((), table.dtype)))


def hide_padding(logits: Float[Array, "*B V"], vocabulary: int) -> Float[Array, "*B V"]:
    """Replaces the logits of padding, if the `vocabulary` does not fill all shards, by `MASKED`."""
    rows = logits.shape[-1]
    if rows * num_shards() == vocabulary:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + shard_index() * rows
    return jnp.where(ids < vocabulary, logits, jnp.float32(MASKED))


def best_token(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The id with the largest logit; ties go to the lower id."""
    best = logits.argmax(axis=-1).astype(jnp.int32)
    if num_shards() == 1:
        return best
    value = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    # Shards are in the order of their ids, and argmax takes the first of equals.
    winner = stack_shards(value).argmax(axis=0)[None]
    ids = stack_shards(best + shard_index() * logits.shape[-1])
    return jnp.take_along_axis(ids, winner, axis=0)[0]


def penalised(logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], factor: float) -> Float[Array, "*B V"]:
    """Logits after a repetition penalty: those of `seen` tokens are divided by `factor`, or multiplied if negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def mark_tokens(
    seen: Bool[Array, "B Q V"], ids: Int[Array, "B Q C"] | Int[Array, "B 1 C"], counts: Bool[Array, "B Q C"]
) -> Bool[Array, "B Q V"]:
    """`seen` with those `ids` that count; each is marked on the shard that holds its part of the vocabulary."""
    rows, branches, size = seen.shape
    row, held = _local_rows(ids, size)
    place = jnp.arange(rows)[:, None, None], jnp.arange(branches)[None, :, None], row
    return seen.at[place].max(held & counts)


def all_finite(logits: Float[Array, "*B V"]) -> Bool[Array, "*B"]:
    """Whether logits are finite, judged by the largest: it is not a number if any of them is not."""
    infinite = ~jnp.isfinite(logits.max(axis=-1))
    return max_over_shards(infinite.astype(jnp.int32)) == 0


def log_probability(logits: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log softmax(logits) at `ids`, in float32."""
    highest = max_over_shards(logits.max(axis=-1))
    total = sum_over_shards(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    row, held = _local_rows(ids, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, row[..., None], axis=-1)[..., 0]
    return sum_over_shards(jnp.where(held, chosen, jnp.float32(0))) - highest - jnp.log(total)


def kl_divergence(reference: Float[Array, "*B V"], logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(reference || logits) of two distributions over the vocabulary, in nats, in float32; both are given as float32 logits.

    The sum over v of p (log p - log q) with p of the reference; where p is 0 the term is 0, as it is for padding.
    """
    p, q = _log_softmax(reference), _log_softmax(logits)
    share = jnp.exp(p)
    return sum_over_shards(jnp.where(share > 0, share * (p - q), jnp.float32(0)).sum(axis=-1))


def _log_softmax(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log softmax over the vocabulary of all shards, of this shard's part of it."""
    shifted = logits - max_over_shards(logits.max(axis=-1))[..., None]
    return shifted - jnp.log(sum_over_shards(jnp.exp(shifted).sum(axis=-1)))[..., None]


def _local_rows(ids: Int[Array, "*B"], num_rows: int) -> tuple[Int[Array, "*B"], Bool[Array, "*B"]]:
    """Rows of `ids` among the `num_rows` of this shard, and whether it holds them; row 0 for those that it does not hold."""
    row = ids - shard_index() * num_rows
    held = (row >= 0) & (row < num_rows)
    return jnp.where(held, row, 0), held
