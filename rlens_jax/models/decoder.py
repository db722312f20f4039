"""The decoder of all families: GQA, RoPE or mRoPE, SwiGLU, RMSNorm, KV cache, and the two reductions.

Layers are stacked: every parameter has a leading axis L. A loop indexes the stack, so one layer is compiled for any number of
them. On a mesh every array is a shard: heads, units and vocabulary are cut over its `model` axis. Layers exchange two sums over
this axis, and the probes' scores.

A plan is *static* or *traced*. With a static plan (`Plan`, for deployment) each run of equal layers is a separate loop, which
contains only the work that the plan leaves. A traced plan (`TracedPlan`, for the search) is data: one program serves all plans
and start layers, with a real `lax.switch` per layer over the levels of the run. A layer that skips an operator for visual tokens
computes the rows of text only; keys and values are made of all tokens at every level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlens_jax.flops import DecoderSizes
from rlens_jax.layout import KV, Queries, Slots, TokenLayout, visible
from rlens_jax.models.cache import KVCache, Newest, cache_of
from rlens_jax.models.layers import Linear, RMSNorm, Rotary, UnitRows, embed_tokens, hide_padding, rope_angles, rotate, rotation
from rlens_jax.ops.attention import Kernel, attend, attend_text, masked_attention
from rlens_jax.ops.ffn import FfnWeights, Kept, Units, dense_ffn, dynamic_ffn
from rlens_jax.ops.ffn_paths import GATHERED, Ways
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits
from rlens_jax.plans import FULL, SKIP, STANDARD_LEVELS, Level, Levels, Plan, Reduction, value_of
from rlens_jax.pytrees import pytree
from rlens_jax.sharding.mesh import FfnForm
from rlens_jax.sharding.model_axis import num_shards, shard_index, sum_over_shards

Out = TypeVar("Out")
States = Float[Array, "B T D"]
Layer = Int[Array, ""]
"""The number of a layer."""
Imposed = Int[Array, "B U"] | None
"""Units that replace those that the probes choose."""
Rows = Float[Array, "B rows D"]
"""Updates of all slots, or of the text slots alone."""


@dataclass(frozen=True)
class DecoderConfig(DecoderSizes):
    """Sizes and constants of a decoder, all read from a checkpoint's config.json."""

    vocabulary: int
    context: int
    """Max sequence length in tokens for which the model was made."""
    norm_eps: float
    rope_theta: float
    rope_sections: tuple[int, ...]
    """Rotary frequencies per position axis; one section of H / 2 is plain RoPE."""
    tied_head: bool
    rope_interleaved: bool = False
    """The sections are interleaved (`rope_angles`)."""
    deepstack: int = 0
    """Number of first layers after which something is added to the visual tokens (Qwen3-VL)."""

    @property
    def position_axes(self) -> int:
        """Number of a token's rotary positions."""
        return len(self.rope_sections)

    @property
    def visual_width(self) -> int:
        """Numbers of a visual token: what the first layer reads, then one feature for each layer with deepstack."""
        return (1 + self.deepstack) * self.width

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis letter."""
        layer = {"D": self.width, "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim, "F": self.ffn_width}
        return layer | {"V": self.vocabulary}


@dataclass(frozen=True)
class TracedLevel:
    """A level that is data: one of several."""

    index: Int[Array, ""]
    levels: tuple[Level, ...]


Setting = Level | TracedLevel
"""What a layer does for visual tokens: static, or data."""
Settings = Callable[[Layer], tuple[Setting, Setting]]
"""What the layer of a number does in its attention and its FFN."""


@pytree
class TracedPlan:
    """A plan as data (`as_data`): the index of each layer's attention and FFN in the levels of the run."""

    attention: Int[Array, "*W L"]
    ffn: Int[Array, "*W L"]
    levels: Levels = field(default=STANDARD_LEVELS, metadata={"static": True})

    def settings(self, layer: Layer) -> tuple[TracedLevel, TracedLevel]:
        """What a layer does in its attention and its FFN."""
        levels = self.levels
        return TracedLevel(self.attention[layer], levels.attention), TracedLevel(self.ffn[layer], levels.ffn)


def as_data(plan: Plan, num_layers: int, levels: Levels = STANDARD_LEVELS) -> TracedPlan:
    """A plan as data. ValueError if a level of it is not among `levels`."""
    attention, ffn = plan.indices(num_layers, levels)
    return TracedPlan(jnp.asarray(attention), jnp.asarray(ffn), levels)


@pytree
class Context:
    """What all layers of a prefill share."""

    layout: TokenLayout
    rotary: Rotary
    random_key: Array
    """Seeds random probes; each layer folds in its number."""
    kernel: Kernel = field(default="packed", metadata={"static": True})
    """What computes the attention."""
    chunk: int | None = field(default=None, metadata={"static": True})
    """Max tokens per sample in an FFN at a time, for long prompts; None is all. Attention then runs in chunks too. Chunks are
    processed *within* each layer, because a reduced layer looks at all visual tokens."""
    halved: HalvedStack | None = None
    """The FFN units that are stored as half rows."""
    features: Float[Array, "B P features"] | None = None
    """What deepstack adds to the visual tokens after layer 0, then 1, ..., along the last axis; None without deepstack."""


@pytree
class LayerRecord:
    """What a layer returns in addition to its states."""

    k: Float[Array, "*L B K T H"]
    v: Float[Array, "*L B K T H"]
    kept: Kept
    """Units that the Dynamic FFN kept; zeros in layers without it, and behind those of layers that keep fewer."""


class Attention(nnx.Module):
    """Projections of grouped-query attention; the caller chooses how the heads attend."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        sizes, bias = config.sizes, config.qkv_bias
        head_norm = (lambda: RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype)) if config.qk_norm else lambda: None
        self.num_kv_heads = config.num_kv_heads
        self.q_proj = Linear("BTD,DNH->BTNH", sizes, bias="NH" if bias else "", dtype=dtype, rngs=rngs)
        self.k_proj = Linear("BTD,DKH->BTKH", sizes, bias="KH" if bias else "", dtype=dtype, rngs=rngs)
        self.v_proj = Linear("BTD,DKH->BTKH", sizes, bias="KH" if bias else "", dtype=dtype, rngs=rngs)
        self.o_proj = Linear("BNTH,NHD->BTD", sizes, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = head_norm(), head_norm()

    def project(self, x: States, rotary: Rotary) -> tuple[Queries, KV, KV]:
        """Rotated queries and keys, and values. Heads come before tokens; a CPU multiplies this order faster.

        Queries and keys are normed before they are rotated, if the decoder has norms for them (Qwen3).
        """
        return self.queries(x, rotary), *self.keys_values(x, rotary)

    def queries(self, x: States, rotary: Rotary) -> Queries:
        """The queries of `project`."""
        q = self.q_proj(x)
        return rotate(q if self.q_norm is None else self.q_norm(q), rotary).swapaxes(1, 2)

    def keys_values(self, x: States, rotary: Rotary) -> tuple[KV, KV]:
        """The keys and values of `project`."""
        k, v = self._local_heads(self.k_proj(x)), self._local_heads(self.v_proj(x))
        return rotate(k if self.k_norm is None else self.k_norm(k), rotary).swapaxes(1, 2), v.swapaxes(1, 2)

    def _local_heads(self, x: Float[Array, "B T K H"]) -> Float[Array, "B T local H"]:
        """The kv heads of this shard's query heads. With fewer kv heads than shards, each shard computes all and uses one."""
        shards = num_shards()
        if shards <= self.num_kv_heads:
            return x
        return jax.lax.dynamic_slice_in_dim(x, shard_index() * self.num_kv_heads // shards, 1, axis=2)


class FFN(nnx.Module):
    """The weights of a gated FFN, one row per unit."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.form: FfnForm = "rows"
        """How the rows are stored: [F, D], or [F, 2, D / 2]. Whoever stores them in halves sets it (`checkpoints.leaves`)."""
        self.ways: Ways = GATHERED
        """How visual tokens can go through some of the units; set with `form`."""
        sizes = config.sizes
        self.gate_proj = Linear("BTD,FD->BTF", sizes, kind=UnitRows, dtype=dtype, rngs=rngs)
        self.up_proj = Linear("BTD,FD->BTF", sizes, kind=UnitRows, dtype=dtype, rngs=rngs)
        self.down_proj = Linear("BTF,FD->BTD", sizes, kind=UnitRows, dtype=dtype, rngs=rngs)

    @property
    def kernels(self) -> tuple[Array, Array, Array]:
        """Gate, up and down as they are stored."""
        return self.gate_proj.kernel[...], self.up_proj.kernel[...], self.down_proj.kernel[...]

    @property
    def weights(self) -> FfnWeights:
        """The matrices [F, D] of a single layer."""
        return FfnWeights(*(kernel.reshape(kernel.shape[0], -1) for kernel in self.kernels), ways=self.ways)

    def units(self, halved: HalvedStack | None, layer: Layer) -> Units:
        """The units of layer number `layer`: this module's weights, or the layer's place in the stack of half rows."""
        return self.weights if halved is None or self.form == "rows" else HalvedUnits(halved, halved.place(layer), ways=self.ways)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated FFN, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.ffn = FFN(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: States, context: Context, reduction: Reduction, attention: Setting, ffn: Setting, layer: Layer
    ) -> tuple[States, LayerRecord]:
        """Layer number `layer` of a prefill; `attention` and `ffn` say what it does for visual tokens."""
        x, k, v = self.attend(x, context, reduction, attention)
        x, kept = self.feed(x, context, reduction, ffn, layer)
        return add_feature(x, context, layer), LayerRecord(k, v, kept)

    @jax.named_scope("attention")
    def attend(self, x: States, context: Context, reduction: Reduction, setting: Setting) -> tuple[States, KV, KV]:
        """The first half: states with attention added, keys and values."""
        layout, rotary, y = context.layout, context.rotary, self.input_norm(x)
        kernel, chunked = context.kernel, context.chunk is not None
        k, v = self.attention.keys_values(y, rotary)

        def attended(q: Queries, level: Level) -> Queries:
            with jax.named_scope(str(level)):
                reach = value_of("attention", level, reduction)
                return attend(
                    q, k, v, layout, reach if isinstance(reach, int) else None, reduction.window, kernel=kernel, chunked=chunked
                )

        def rows(setting: Setting) -> Rows:
            q = self.attention.queries(y, rotary)
            return self.attention.o_proj(select(setting, partial(attended, q)))

        def text_rows() -> Rows:
            text, (cos, sin) = slice(layout.bucket.text), rotary
            q = self.attention.queries(y[:, text], (cos[:, text], sin[:, text]))
            return rows_of(
                setting, self.attention.o_proj(attend_text(q, k, v, layout, kernel=kernel, chunked=chunked)), x.shape[1]
            )

        return add_rows(x, sum_over_shards(unless_skipped(setting, rows, text_rows))), k, v

    @jax.named_scope("ffn")
    def feed(
        self, x: States, context: Context, reduction: Reduction, setting: Setting, layer: Layer, imposed: Imposed = None
    ) -> tuple[States, Kept]:
        """The second half: states with the FFN added, and what the probes chose, also if other units are `imposed`."""
        layout, chunk, units = context.layout, context.chunk, self.ffn.units(context.halved, layer)
        num_units, key = units.number * num_shards(), jax.random.fold_in(context.random_key, layer)
        levels = setting.levels if isinstance(setting, TracedLevel) else (setting,)
        reductions = [with_fraction(reduction, level) for level in levels]
        width, batch = max(one.kept_units(num_units) for one in reductions), x.shape[0]
        none_kept = Kept(jnp.zeros((batch, width), jnp.int32), jnp.ones(batch, bool))

        def fed(y: States, level: Level) -> tuple[Rows, Kept]:
            one = with_fraction(reduction, level)
            if level == FULL or one.kept_units(num_units) == num_units:
                return dense_ffn(y, units, chunk), none_kept
            with jax.named_scope(str(level)):
                rows, kept = dynamic_ffn(y, units, layout, one, key, imposed, chunk)
                return rows, kept.padded(width)

        def rows(setting: Setting) -> tuple[Rows, Kept]:
            return select(setting, partial(fed, self.ffn_norm(x)))

        def text_rows() -> tuple[Rows, Kept]:
            update = dense_ffn(self.ffn_norm(x[:, : layout.bucket.text]), units, chunk)
            return rows_of(setting, update, x.shape[1]), none_kept

        update, kept = unless_skipped(setting, rows, text_rows)
        return add_rows(x, sum_over_shards(update)), kept

    def at(self, x: States, slots: Int[Array, "B A"], context: Context, units: Units) -> Float[Array, "B A D"]:
        """The states after the layer in some text slots alone; what it does for visual tokens changes none of them."""

        def take(values: Array) -> Array:
            return jnp.take_along_axis(values, slots.reshape(*slots.shape, *(1,) * (values.ndim - 2)), axis=1)

        cos, sin = context.rotary
        with jax.named_scope("attention"):
            y, key = self.input_norm(x), context.layout.slots
            k, v = self.attention.keys_values(y, context.rotary)
            q = self.attention.queries(take(y), (take(cos), take(sin)))
            attended = masked_attention(q, k, v, visible(key.cut(take), key, None))
            x = take(x) + sum_over_shards(self.attention.o_proj(attended))
        with jax.named_scope("ffn"):
            return x + sum_over_shards(dense_ffn(self.ffn_norm(x), units))

    def decode(
        self, x: States, rotary: Rotary, cache: KVCache, layer: Layer, newest: Newest, units: Units
    ) -> tuple[States, KVCache]:
        """One new token per branch through plain layer number `layer` (paper: decoding is never reduced)."""
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.input_norm(x), rotary)
            cache = cache.with_newest(k, v, layer, newest)
            x = x + sum_over_shards(self.attention.o_proj(cache.attend(q, layer, newest)))
        with jax.named_scope("ffn"):
            x = x + sum_over_shards(dense_ffn(self.ffn_norm(x), units))
        return x, cache


def add_feature(x: States, context: Context, layer: int | Layer) -> States:
    """The states after layer number `layer` and behind its deepstack feature, if it has one; no reduction touches the feature."""
    if context.features is None:
        return x
    width, num_text = x.shape[2], context.layout.bucket.text
    feature = jax.lax.dynamic_slice_in_dim(context.features, layer * width, width, axis=2)  # the last one for later layers
    # One program serves all layers. To add zeros in later ones takes less time than a branch.
    feature = jnp.where((layer + 1) * width <= context.features.shape[2], feature, jnp.zeros((), feature.dtype))
    return x + jnp.pad(feature, ((0, 0), (num_text, 0), (0, 0)))


def select(setting: Setting, compute: Callable[[Level], Out]) -> Out:
    """`compute` of a level; of a traced one, by a `lax.switch` over the levels of the run."""
    if isinstance(setting, TracedLevel):
        return jax.lax.switch(setting.index, [partial(compute, level) for level in setting.levels])
    return compute(setting)


def unless_skipped(setting: Setting, update: Callable[[Setting], Out], text_update: Callable[[], Out]) -> Out:
    """`text_update` of a level that skips the operator, `update` of all others.

    Of a traced level, `update` has a branch of its own only if a layer of the run may skip the operator. Otherwise the weights
    that all levels share would be copied for the branch.
    """
    if not isinstance(setting, TracedLevel):
        return text_update() if setting == SKIP else update(setting)
    if SKIP not in setting.levels:
        return update(setting)
    others = TracedLevel(setting.index, setting.levels[:-1])  # SKIP is the last of them
    return jax.lax.cond(setting.index == len(others.levels), text_update, lambda: update(others))


def rows_of(setting: Setting, text_rows: Rows, num_slots: int) -> Float[Array, "B slots D"]:
    """An update of text slots alone; of a traced level, whose branches have equal shapes, with zeros for the other slots."""
    if not isinstance(setting, TracedLevel):
        return text_rows
    return jnp.pad(text_rows, ((0, 0), (0, num_slots - text_rows.shape[1]), (0, 0)))


def add_rows(x: States, update: Rows) -> States:
    """The states with an update added to the first slots, of which there may be fewer."""
    rows = update.shape[1]
    return x + update if rows == x.shape[1] else jnp.concatenate([x[:, :rows] + update, x[:, rows:]], axis=1)


def hold_text_before(x: States, held: States, layout: TokenLayout) -> States:
    """States `x` in which the text before the last visual token of its row is as in `held` (`Plan.freeze_text_before`)."""
    visual, text = jnp.asarray(layout.visual_position), slice(layout.bucket.text)
    real = jax.lax.broadcasted_iota(jnp.int32, visual.shape, 1) < jnp.asarray(layout.num_visual)[:, None]
    last = jnp.where(real, visual, -1).max(axis=1, keepdims=True)
    before = (jnp.asarray(layout.text_position) < last)[:, :, None]
    return jnp.concatenate([jnp.where(before, held[:, text], x[:, text]), x[:, text.stop :]], axis=1)


def with_fraction(reduction: Reduction, level: Level) -> Reduction:
    """The reduction with the share of units that a level of the FFN keeps, unchanged if the level chooses none."""
    fraction = value_of("ffn", level, reduction)
    return reduction if isinstance(fraction, str) else replace(reduction, active_fraction=fraction)


class Decoder(nnx.Module):
    """Token embeddings, stacked layers, final norm and head."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (config.vocabulary, config.width)
        scale = jnp.asarray(0.02, dtype)
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, axes="VD")
        make = nnx.vmap(lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs))
        self.layers = make(rngs.split(config.num_layers))
        self.whole: tuple[int, ...] = ()
        """Layers whose units are rows in `whole_ffn` where those of all others are half rows (`keep_rows`)."""
        self.whole_ffn: FFN | None = None
        self.norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.head = None if config.tied_head else nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, axes="VD")

    @jax.named_scope("embed")
    def embed(self, text_ids: Int[Array | np.ndarray, "B X"], visual: Float[Array, "B P visual_width"]) -> States:
        """Packed states: embeddings of the text tokens, then the connector's outputs without deepstack features."""
        text = embed_tokens(self.embedding[...], jnp.asarray(text_ids))
        return jnp.concatenate([text, visual[:, :, : self.config.width].astype(text.dtype)], axis=1)

    def features(self, visual: Float[Array, "B P visual_width"]) -> Float[Array, "B P features"] | None:
        """The deepstack features in the connector's outputs, behind which there may be marks; None without deepstack."""
        return (
            visual[:, :, self.config.width : self.config.visual_width].astype(self.embedding.dtype)
            if self.config.deepstack
            else None
        )

    def context(
        self,
        layout: TokenLayout,
        rope_positions: Int[Array | np.ndarray, "B axes T"],
        random_key: Array,
        kernel: Kernel = "packed",
        chunk: int | None = None,
        features: Float[Array, "B P features"] | None = None,
    ) -> Context:
        """What all layers of a prefill share; `rope_positions` are packed like the states; `features` as `Decoder.features`."""
        if (features is not None) != (self.config.deepstack > 0):
            raise ValueError(
                f"deepstack = {self.config.deepstack}, but features are {'missing' if features is None else 'given'}"
            )
        return Context(layout, self.rotary(rope_positions), random_key, kernel, chunk, self._halved(), features)

    def layer(self, number: int | Layer) -> DecoderLayer:
        """A single layer."""
        return nnx.merge(*layer_at(nnx.split(self.layers), number))

    def logits(self, x: States) -> Float[Array, "B T V"]:
        """Final norm and head, in float32; on a mesh, the logits of this shard's part of the vocabulary."""
        return self.read_out(self.norm(x))

    @jax.named_scope("head")
    def read_out(self, normed: States) -> Float[Array, "B T V"]:
        """The head: `logits` of states behind the final norm."""
        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum("BTD,VD->BTV", normed, head[...], preferred_element_type=jnp.float32)
        return hide_padding(logits, self.config.vocabulary)

    def prefill(
        self, x: States, context: Context, plan: Plan | TracedPlan, reduction: Reduction, layers: range | None = None
    ) -> tuple[States, LayerRecord]:
        """All layers, or the consecutive `layers`: the last states, and the stacked records of these layers."""
        num_layers, records = self.config.num_layers, []
        holds_text = isinstance(plan, Plan) and plan.freeze_text_before
        for run, settings in _runs(plan, range(num_layers) if layers is None else layers, num_layers):

            def body(whole: bool, x: Array, layer: Array, settings: Settings = settings) -> tuple[Array, LayerRecord]:
                y, record = self._stored_layer(layer, whole)(x, context, reduction, *settings(layer), layer)
                held = holds_text and settings(layer) == (SKIP, SKIP)
                return (hold_text_before(y, x, context.layout) if held else y), record

            for part, whole in self._stored_alike(run):
                x, record = jax.lax.scan(partial(body, whole), x, jnp.arange(part.start, part.stop, dtype=jnp.int32))
                records.append(record)
        return x, join_records(records)

    def run_layers(
        self, x: States, context: Context, plan: TracedPlan, reduction: Reduction, start: Layer, stop: Layer
    ) -> tuple[States, Bool[Array, " B"]]:
        """Layers `start` .. `stop` - 1 under a traced plan: the states, and whether all probe scores were finite.

        Raises:
            ValueError: some layers are stored as rows (`keep_rows`), but which ones run is data.
        """
        if self.whole:
            raise ValueError("the units of all layers must be stored alike")

        def body(layer: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, scored = carry
            x, record = self.layer(layer)(x, context, reduction, *plan.settings(layer), layer)
            return x, scored & record.kept.scored

        return jax.lax.fori_loop(start, stop, body, (x, jnp.ones(x.shape[0], bool)))

    def last_layer_at(self, x: States, context: Context, slots: Int[Array, "B A"]) -> States:
        """The states with those of some text slots after the last layer; `x` enters it."""
        layer = jnp.int32(self.config.num_layers - 1)
        module = self.layer(layer)
        last = module.at(x, slots, context, module.ffn.units(context.halved, layer))
        return x.at[jnp.arange(x.shape[0])[:, None], slots].set(last)

    def make_cache(
        self, record: LayerRecord, layout: TokenLayout, new_tokens: int, shift: Int[Array, " B"] | None = None
    ) -> KVCache:
        """The cache of the layers of a prefill, with room for `new_tokens` more in all; plans drop nothing from it (paper).

        `shift` as in `KVCache`; None is 0.
        """
        return cache_of(record.k, record.v, layout.slots, new_tokens, shift)

    def decode(
        self,
        token_ids: Int[Array, "B Q"],
        cache: KVCache,
        position: Int[Array, "B Q"],
        rope_position: Int[Array, "B axes Q"],
        room: Int[Array, ""],
        longest: int | None = None,
    ) -> tuple[Float[Array, "B Q V"], KVCache]:
        """One decoding step of all branches: logits of the next token of each, and the cache with the newest, at `position`.

        The last `room` slots of each layer are free, and the newest tokens go into the first of them. No layer has more than
        `longest` slots; None is as many as all have, if none was shortened.
        """
        x, halved = embed_tokens(self.embedding[...], token_ids), self._halved()
        branch = 1 + jax.lax.broadcasted_iota(jnp.int32, position.shape, 1)
        slots = Slots(position, jnp.full_like(position, -1), branch)
        newest = Newest(slots, room, longest or cache.k.shape[2] // self.config.num_layers)

        def body(whole: bool, number: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            x, cache = carry
            module = self._stored_layer(number, whole)
            rotary = self.rotary(rope_position - cache.shift[:, number][:, None, None])
            return module.decode(x, rotary, cache, number, newest, module.ffn.units(halved, number))

        for part, whole in self._stored_alike(range(self.config.num_layers)):
            x, cache = jax.lax.fori_loop(part.start, part.stop, partial(body, whole), (x, cache))
        return self.logits(x), cache

    def keep_rows(self, whole: Sequence[int], ways: Ways) -> None:
        """Store the units of some layers as rows, which dense products read fastest; those of the others stay half rows.

        For a deployed model, whose plan says which layers no reduction touches. If it reduces one of them after all, visual
        tokens go through its units in one of these `ways`. Each matrix is copied once, with all its layers.
        """
        halved, rows = self.layers.ffn, nnx.clone(self.layers.ffn)
        rows.form, rows.ways, self.whole, self.whole_ffn = "rows", ways, tuple(whole), nnx.data(rows)
        others = [layer for layer in range(self.config.num_layers) if layer not in self.whole]
        for name in ("gate_proj", "up_proj", "down_proj"):
            kernel = getattr(halved, name).kernel
            getattr(rows, name).kernel = UnitRows(_rows_of(kernel.get_value(), self.whole), axes="FD")
            getattr(halved, name).kernel = kernel.replace(_layers_of(kernel.get_value(), tuple(others)))

    def _stored_alike(self, run: range) -> list[tuple[range, bool]]:
        """Consecutive layers of a run whose units are stored alike, and whether they are those of `whole`."""
        parts = [(list(part), whole) for whole, part in groupby(run, lambda layer: layer in self.whole)]
        return [(range(part[0], part[-1] + 1), whole) for part, whole in parts] or [(run, False)]

    def _stored_layer(self, number: Layer, whole: bool) -> DecoderLayer:
        """A layer with its units as they are stored."""
        module = self.layer(number)
        if whole:
            place = jnp.searchsorted(jnp.asarray(self.whole, jnp.int32), number)
            module.ffn = nnx.merge(*layer_at(nnx.split(self.whole_ffn), place))
        return module

    def rotary(self, rope_positions: Int[Array | np.ndarray, "B axes T"]) -> Rotary:
        """Cosine and sine at these positions."""
        config = self.config
        angles = rope_angles(rope_positions, config.rope_theta, config.rope_sections, interleaved=config.rope_interleaved)
        return rotation(angles)

    def _halved(self) -> HalvedStack | None:
        """The FFN units that are stored as half rows, if any are."""
        ffn, count = self.layers.ffn, self.config.num_layers
        if ffn.form == "rows":
            return None
        places = tuple(layer - sum(other < layer for other in self.whole) for layer in range(count)) if self.whole else ()
        return HalvedStack(*ffn.kernels, places=places)


@partial(jax.jit, static_argnums=1)
def _layers_of(stack: Array, layers: tuple[int, ...]) -> Array:
    return stack[jnp.asarray(layers)]


@partial(jax.jit, static_argnums=1)
def _rows_of(stack: Float[Array, "L F 2 half"], layers: tuple[int, ...]) -> Float[Array, "some F D"]:
    """Some layers of a stack of half rows, as rows."""
    return stack[jnp.asarray(layers)].reshape(len(layers), stack.shape[1], -1)


def _runs(plan: Plan | TracedPlan, layers: range, num_layers: int) -> list[tuple[range, Settings]]:
    """Consecutive layers that share a loop, and the loop's settings. Without layers, there is one loop without steps."""
    if isinstance(plan, TracedPlan):
        return [(layers, plan.settings)]

    def static(attention: Level, ffn: Level) -> Settings:
        return lambda layer: (attention, ffn)

    clipped = [
        (range(max(start, layers.start), min(stop, layers.stop)), static(attention, ffn))
        for start, stop, attention, ffn in plan.runs(num_layers)
    ]
    return [(run, settings) for run, settings in clipped if run] or [(layers, static(FULL, FULL))]


def join_records(records: Sequence[LayerRecord]) -> LayerRecord:
    """The records of consecutive layers in one."""
    width = max(record.kept.units.shape[-1] for record in records)
    padded = [replace(record, kept=record.kept.padded(width)) for record in records]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *padded)


def layer_at(stack: PyTree, layer: int | Layer) -> PyTree:
    """One layer's parameters out of the stack."""
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stack)
