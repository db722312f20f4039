"""The one decoder of all families: GQA, RoPE or mRoPE, SwiGLU, RMSNorm, KV cache, and the two reductions.

Layers are stacked (one leading axis L on every parameter) and run in a loop that indexes the stack, so one layer is compiled
whatever their number. Inside of a mesh every array is a shard: heads, units and vocabulary are cut over its `model` axis, and
a layer's two sums over it are all that layers exchange beside probe scores. A plan is either *static* (`Plan`: each run of
equal layers is its own loop with only what is left of it compiled, for deployment) or *traced* (`TracedPlan`: one program for
all plans and start layers, real `lax.cond` per layer, for the search).

Axis letters: B batch, T packed slots (X text, P visual), S cache slots, N query heads, K kv heads, H head dim, D width,
F FFN units, V vocabulary, L layers, U kept units.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlens_jax.layout import PADDING_POSITION, Slots, TokenLayout, visible
from rlens_jax.models import vocabulary
from rlens_jax.models.layers import Linear, RMSNorm, rope_angles, rotate, rotation
from rlens_jax.ops.attention import Kernel, attend, masked_attention
from rlens_jax.ops.ffn import FfnWeights, Kept, Units, dense_ffn, dynamic_ffn
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits
from rlens_jax.plan import Plan, Reduction
from rlens_jax.sharding.model_axis import num_shards, shard_index, sum_over_shards

Out = TypeVar("Out")
Flags = Callable[[Array], tuple[bool | Array, bool | Array]]
"""Whether a layer is hollow and whether it is dynamic: known beforehand, or data."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder, all read from a checkpoint's config.json."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    vocabulary: int
    context: int
    """The longest sequence the model was made for, in tokens."""
    norm_eps: float
    rope_theta: float
    rope_sections: tuple[int, ...]
    """Rotary frequencies per position axis; one section of H / 2 is plain RoPE."""
    qkv_bias: bool
    tied_head: bool

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "D": self.width,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "F": self.ffn_width,
            "V": self.vocabulary,
        }


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TracedPlan:
    """A plan as data: which layers use Hollow Attention and which a Dynamic FFN."""

    hollow: Bool[Array, " L"]
    dynamic: Bool[Array, " L"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer needs beside the states: the packing, and the rotary cosines and sines."""

    layout: TokenLayout
    turn: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
    random_key: Array
    """Seeds random probes; each layer folds in its number."""
    kernel: Kernel = field(default="packed", metadata={"static": True})
    """What computes the attention of a prefill."""
    chunk: int | None = field(default=None, metadata={"static": True})
    """How many tokens of a sample are in an FFN at a time; None is all at once, and attention in whatever order. A long prompt
    goes chunk by chunk *within* each layer, because a reduced layer looks at all visual tokens.
    """
    stored: HalvedStack | None = None
    """The FFN units of all layers, where they are kept for a kernel."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of consecutive layers that hold the same tokens, and the sequence position of each slot.

    Slots of the prefill are followed by those of new tokens.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    position: Int[Array, "B S"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRecord:
    """What a layer hands out beside its states."""

    k: Float[Array, "*L B K T H"]
    v: Float[Array, "*L B K T H"]
    kept: Kept
    """Units that the Dynamic FFN kept; zeros in layers without it."""


class Attention(nnx.Module):
    """Projections of grouped-query attention; how the heads attend is the caller's choice."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, bias = config.sizes, config.qkv_bias
        self.num_kv_heads = config.num_kv_heads
        self.q_proj = Linear("BTD,DNH->BTNH", sizes, bias="NH" if bias else "", dtype=dtype, rngs=rngs)
        self.k_proj = Linear("BTD,DKH->BTKH", sizes, bias="KH" if bias else "", dtype=dtype, rngs=rngs)
        self.v_proj = Linear("BTD,DKH->BTKH", sizes, bias="KH" if bias else "", dtype=dtype, rngs=rngs)
        self.o_proj = Linear("BNTH,NHD->BTD", sizes, dtype=dtype, rngs=rngs)

    def project(
        self, x: Float[Array, "B T D"], turn: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated queries and keys, and values; heads before tokens, which the CPU multiplies faster."""
        q, k, v = self.q_proj(x), self._own(self.k_proj(x)), self._own(self.v_proj(x))
        q, k = rotate(q, turn), rotate(k, turn)
        return q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def _own(self, x: Float[Array, "B T K H"]) -> Float[Array, "B T K_own H"]:
        """The kv heads that this shard's query heads use: of fewer kv heads than shards, each shard makes all and uses one."""
        shards = num_shards()
        if shards <= self.num_kv_heads:
            return x
        return jax.lax.dynamic_slice_in_dim(x, shard_index() * self.num_kv_heads // shards, 1, axis=2)


class FFN(nnx.Module):
    """The weights of a gated FFN, one row a unit: [F, D], or [F, 2, D / 2] where `weights/leaves.py` keeps them so for a TPU."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_proj = Linear("BTD,FD->BTF", config.sizes, dtype=dtype, rngs=rngs)
        self.up_proj = Linear("BTD,FD->BTF", config.sizes, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("BTF,FD->BTD", config.sizes, dtype=dtype, rngs=rngs)

    @property
    def kernels(self) -> tuple[Array, Array, Array]:
        """Gate, up and down as they are kept."""
        return self.gate_proj.kernel[...], self.up_proj.kernel[...], self.down_proj.kernel[...]

    @property
    def weights(self) -> FfnWeights:
        """Of a single layer, as [F, D]."""
        return FfnWeights(*(kernel.reshape(kernel.shape[0], -1) for kernel in self.kernels))

    def units(self, stored: HalvedStack | None, layer: Int[Array, ""]) -> Units:
        """Of layer number `layer`: its own weights, or where all layers' are `stored`, its place among them."""
        return self.weights if stored is None else HalvedUnits(stored, layer)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated FFN, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.ffn = FFN(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        reduction: Reduction,
        hollow: bool | Bool[Array, ""],
        dynamic: bool | Bool[Array, ""],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], LayerRecord]:
        """One layer of a prefill; `hollow` and `dynamic` say which reductions it uses, `layer` its number."""
        x, k, v = self.attend(x, context, reduction, hollow)
        x, kept = self.feed(x, context, reduction, dynamic, layer)
        return x, LayerRecord(k, v, kept)

    def attend(
        self, x: Float[Array, "B T D"], context: Context, reduction: Reduction, hollow: bool | Bool[Array, ""]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """The first half: states with attention added, and the keys and values."""
        layout = context.layout
        q, k, v = self.attention.project(self.input_norm(x), context.turn)
        compute = partial(attend, q, k, v, layout, kernel=context.kernel, chunked=context.chunk is not None)
        attended = _choose(
            hollow,
            lambda: compute(reduction.attention_range, reduction.window),
            lambda: compute(None),
        )
        return x + sum_over_shards(self.attention.o_proj(attended)), k, v

    def feed(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        reduction: Reduction,
        dynamic: bool | Bool[Array, ""],
        layer: Int[Array, ""],
        imposed: Int[Array, "B U"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Kept]:
        """The second half: states with the FFN added, and what the probes chose, even where other units are `imposed`."""
        chunk, batch = context.chunk, x.shape[0]
        y, units = self.ffn_norm(x), self.ffn.units(context.stored, layer)
        key = jax.random.fold_in(context.random_key, layer)
        nothing = Kept(
            jnp.zeros((batch, reduction.kept_units(units.number * num_shards())), jnp.int32),
            jnp.ones(batch, bool),
        )
        y, kept = _choose(
            dynamic,
            lambda: dynamic_ffn(y, units, context.layout, reduction, key, imposed, chunk),
            lambda: (dense_ffn(y, units, chunk), nothing),
        )
        return x + sum_over_shards(y), kept

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        turn: tuple[Float[Array, "B 1 half"], Float[Array, "B 1 half"]],
        k_cache: Float[Array, "B K S H"],
        v_cache: Float[Array, "B K S H"],
        mask: Bool[Array, "B 1 S"],
        slot: Int[Array, ""],
        units: Units,
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """One new token of each sample through the plain layer (paper: decoding is never reduced)."""
        q, k, v = self.attention.project(self.input_norm(x), turn)
        k_cache = jax.lax.dynamic_update_slice_in_dim(k_cache, k, slot, axis=2)
        v_cache = jax.lax.dynamic_update_slice_in_dim(v_cache, v, slot, axis=2)
        x = x + sum_over_shards(self.attention.o_proj(masked_attention(q, k_cache, v_cache, mask)))
        return x + sum_over_shards(dense_ffn(self.ffn_norm(x), units)), k_cache, v_cache


def _choose(flag: bool | Bool[Array, ""], yes: Callable[[], Out], no: Callable[[], Out]) -> Out:
    """Only the chosen branch is compiled for a static flag, only the chosen one runs for a traced flag."""
    if isinstance(flag, bool):
        return yes() if flag else no()
    return jax.lax.cond(flag, yes, no)


class Decoder(nnx.Module):
    """Token embeddings, stacked layers, final norm and head."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (config.vocabulary, config.width)
        scale = jnp.asarray(0.02, dtype)
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, axes="VD")
        make = nnx.vmap(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.head = (
            None if config.tied_head else nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, axes="VD")
        )

    def embed(self, text_ids: Int[Array | np.ndarray, "B X"], visual: Float[Array, "B P D"]) -> Float[Array, "B T D"]:
        """Packed embeddings: those of the text tokens, then the connector's outputs."""
        text = vocabulary.embed(self.embedding[...], jnp.asarray(text_ids))
        return jnp.concatenate([text, visual.astype(text.dtype)], axis=1)

    def context(
        self,
        layout: TokenLayout,
        rope_positions: Int[Array | np.ndarray, "B axes T"],
        random_key: Array,
        kernel: Kernel = "packed",
        chunk: int | None = None,
    ) -> Context:
        """What all layers of one prefill share; `rope_positions` are packed like the states."""
        return Context(layout, self._turn(rope_positions), random_key, kernel, chunk, self._stored())

    def _stored(self) -> HalvedStack | None:
        """The FFN units of all layers, if they are kept for a kernel."""
        stack = HalvedStack(*self.layers.ffn.kernels)
        return stack if stack.gate.ndim == 4 else None

    def _turn(
        self, rope_positions: Int[Array | np.ndarray, "B axes T"]
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        return rotation(rope_angles(rope_positions, self.config.rope_theta, self.config.rope_sections))

    def prefill(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        plan: Plan | TracedPlan,
        reduction: Reduction,
        layers: range | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerRecord]:
        """All layers, or the consecutive `layers`: the last states, and every layer's record, stacked."""
        graph, stack = nnx.split(self.layers)
        span = layers or range(self.config.num_layers)
        if isinstance(plan, TracedPlan):
            runs = [(span, lambda layer: (plan.hollow[layer], plan.dynamic[layer]))]
        else:
            clipped = [
                (
                    range(max(start, span.start), min(stop, span.stop)),
                    lambda _, flags=(hollow, dynamic): flags,
                )
                for start, stop, hollow, dynamic in plan.runs(self.config.num_layers)
            ]
            runs = [(run, flags) for run, flags in clipped if run]
        records = []
        for run, flags in runs:

            def body(x: Array, layer: Array, flags: Flags = flags) -> tuple[Array, LayerRecord]:
                module = nnx.merge(graph, layer_at(stack, layer))
                return module(x, context, reduction, *flags(layer), layer)

            x, record = jax.lax.scan(body, x, jnp.arange(run.start, run.stop, dtype=jnp.int32))
            records.append(record)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        plan: TracedPlan,
        reduction: Reduction,
        start: Int[Array, ""],
        stop: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Bool[Array, " B"]]:
        """Layers `start` .. `stop` - 1 under a traced plan: the states, and whether all probe scores were numbers."""
        graph, stack = nnx.split(self.layers)

        def body(layer: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, scored = carry
            module = nnx.merge(graph, layer_at(stack, layer))
            x, record = module(x, context, reduction, plan.hollow[layer], plan.dynamic[layer], layer)
            return x, scored & record.kept.scored

        return jax.lax.fori_loop(start, stop, body, (x, jnp.ones(x.shape[0], bool)))

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and head, in float32; inside of a mesh, of this shard's part of the vocabulary."""
        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum("BTD,VD->BTV", self.norm(x), head[...], preferred_element_type=jnp.float32)
        return vocabulary.hide_padding(logits, self.config.vocabulary)

    def layer(self, number: int) -> DecoderLayer:
        """One layer by itself."""
        graph, stack = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda p: p[number], stack))

    def make_cache(self, record: LayerRecord, layout: TokenLayout, new_tokens: int) -> KVCache:
        """The cache of the layers of a prefill, with room for `new_tokens` more; plans drop nothing from it (paper)."""
        room = ((0, 0), (0, 0), (0, 0), (0, new_tokens), (0, 0))
        position = jnp.pad(layout.slots.position, ((0, 0), (0, new_tokens)), constant_values=PADDING_POSITION)
        return KVCache(jnp.pad(record.k, room), jnp.pad(record.v, room), position)

    def decode(
        self,
        token_ids: Int[Array, " B"],
        caches: tuple[KVCache, ...],
        position: Int[Array, " B"],
        rope_position: Int[Array, "B axes"],
        room: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], tuple[KVCache, ...]]:
        """One decoding step: logits of the next token and the caches with this one.

        Args:
            token_ids: the newest token of each sample.
            caches: keys and values of all earlier tokens; one for all layers, unless tokens were pruned between layers.
            position: sequence positions of the newest tokens, later than all others.
            rope_position: their rotary positions.
            room: how many slots at the end of each cache are free; the token goes into the first of them.
        """
        turn = self._turn(rope_position[:, :, None])
        x = vocabulary.embed(self.embedding[...], token_ids)[:, None]
        first, advanced = 0, []
        for cache in caches:
            x, cache = self._decode_layers(x, first, cache, turn, position, cache.position.shape[1] - room)
            first += cache.k.shape[0]
            advanced.append(cache)
        return self.logits(x)[:, 0], tuple(advanced)

    def _decode_layers(
        self,
        x: Float[Array, "B 1 D"],
        first: int,
        cache: KVCache,
        turn: tuple[Float[Array, "B 1 half"], Float[Array, "B 1 half"]],
        position: Int[Array, " B"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """The layers of one cache, from number `first` on."""
        graph, stack = nnx.split(self.layers)
        positions = jax.lax.dynamic_update_slice_in_dim(cache.position, position[:, None], slot, axis=1)
        query, key = (Slots(p, jnp.full_like(p, -1)) for p in (position[:, None], positions))
        mask, stored = visible(query, key, None), self._stored()

        def body(x: Array, layer: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            number, k, v = layer
            module = nnx.merge(graph, layer_at(stack, number))
            x, k, v = module.decode(x, turn, k, v, mask, slot, module.ffn.units(stored, number))
            return x, (k, v)

        numbers = jnp.arange(first, first + cache.k.shape[0])
        x, (k, v) = jax.lax.scan(body, x, (numbers, cache.k, cache.v))
        return x, KVCache(k, v, positions)


def layer_at(stack: PyTree, layer: Int[Array, ""]) -> PyTree:
    """One layer's parameters out of the stack."""
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stack)
