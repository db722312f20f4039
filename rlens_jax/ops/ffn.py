"""Gated FFN, dense and Probe-Activated Dynamic (paper; details in method.md).

All weights are stored [F, D], one row a unit, so that choosing units is a gather of contiguous rows.
`simulated_dynamic_ffn` computes every unit and masks; `dynamic_ffn` is the measured path: gate, up and down of the visual
tokens are computed on the kept units only, and the probes share one pass over the full weights with the text tokens.

Axis letters: B batch, T packed slots (X text, P visual), D width, F units, M probes, U kept units.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlens_jax.layout import TokenLayout
from rlens_jax.plan import Reduction


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FfnWeights:
    """The three matrices of a gated FFN, one row a unit."""

    gate: Float[Array, "*B F D"]
    up: Float[Array, "*B F D"]
    down: Float[Array, "*B F D"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What the probes chose: unit numbers, best first, and whether all scores of the sample were numbers."""

    units: Int[Array, "B U"]
    scored: Bool[Array, " B"]


def hidden_units(x: Float[Array, "B T D"], weights: FfnWeights) -> Float[Array, "B T F"]:
    """H = silu(x Wg) * (x Wu)."""
    gate = jnp.einsum("BTD,FD->BTF", x, weights.gate)
    up = jnp.einsum("BTD,FD->BTF", x, weights.up)
    return jax.nn.silu(gate) * up


def dense_ffn(x: Float[Array, "B T D"], weights: FfnWeights) -> Float[Array, "B T D"]:
    """Every token through every unit."""
    return jnp.einsum("BTF,FD->BTD", hidden_units(x, weights), weights.down)


def probe_slots(
    layout: TokenLayout, reduction: Reduction, random_key: Array
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """The probes' ordinals and which of them count (samples differ in M; the array is as wide as the largest can be).

    Strided probes sit at (i P) // M (our decision). Random ones (the paper's) are drawn without replacement from
    `random_key`, which names run and layer, and the sample's number.
    """
    visual_slots = layout.bucket.visual
    capacity = reduction.probe_capacity(visual_slots)
    counts = np.array([reduction.probe_count(n) for n in range(visual_slots + 1)], np.int32)
    count = jnp.asarray(counts)[layout.num_visual][:, None]
    index = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (count.shape[0], capacity))
    if reduction.probe == "strided":
        slots = index * layout.num_visual[:, None] // jnp.maximum(count, 1)
    else:
        keys = jax.vmap(lambda sample: jax.random.fold_in(random_key, sample))(layout.sample)
        draw = jax.vmap(lambda key: jax.random.uniform(key, (visual_slots,)))(keys)
        ordinal = jax.lax.broadcasted_iota(jnp.int32, draw.shape, 1)
        draw = jnp.where(ordinal < layout.num_visual[:, None], draw, 2.0)
        slots = jnp.argsort(draw, axis=1)[:, :capacity].astype(jnp.int32)
    return jnp.minimum(slots, visual_slots - 1), index < count


def choose_units(hidden: Float[Array, "B M F"], is_probe: Bool[Array, "B M"], num_units: int) -> Kept:
    """The `num_units` units with the largest mean |H| over the probes, in float32; ties go to the lower unit."""
    magnitude = jnp.where(is_probe[:, :, None], jnp.abs(hidden.astype(jnp.float32)), 0.0)
    count = jnp.maximum(1, is_probe.sum(axis=1)).astype(jnp.float32)
    scores = magnitude.sum(axis=1) / count[:, None]
    _, units = jax.lax.top_k(scores, num_units)
    return Kept(units, jnp.isfinite(scores).all(axis=1))


def simulated_dynamic_ffn(
    x: Float[Array, "B T D"],
    weights: FfnWeights,
    layout: TokenLayout,
    reduction: Reduction,
    random_key: Array,
) -> tuple[Float[Array, "B T D"], Kept]:
    """The plain reference: all units for all tokens, then the dropped units of visual tokens are set to 0."""
    num_text = layout.bucket.text
    hidden = hidden_units(x, weights)
    slots, is_probe = probe_slots(layout, reduction, random_key)
    probes = jnp.take_along_axis(hidden[:, num_text:], slots[:, :, None], axis=1)
    kept = choose_units(probes, is_probe, reduction.kept_units(weights.gate.shape[0]))
    keep = jax.nn.one_hot(kept.units, hidden.shape[2], dtype=bool).any(axis=1)
    is_text = jnp.arange(hidden.shape[1]) < num_text
    hidden = jnp.where(is_text[None, :, None] | keep[:, None, :], hidden, jnp.zeros_like(hidden))
    return jnp.einsum("BTF,FD->BTD", hidden, weights.down), kept


def dynamic_ffn(
    x: Float[Array, "B T D"],
    weights: FfnWeights,
    layout: TokenLayout,
    reduction: Reduction,
    random_key: Array,
    imposed: Int[Array, "B U"] | None = None,
) -> tuple[Float[Array, "B T D"], Kept]:
    """The measured path; same result as `simulated_dynamic_ffn`.

    Units that are `imposed` are used instead of what the probes choose, which is returned all the same.
    """
    num_text = layout.bucket.text
    text, visual = x[:, :num_text], x[:, num_text:]
    slots, is_probe = probe_slots(layout, reduction, random_key)
    probes = jnp.take_along_axis(visual, slots[:, :, None], axis=1)
    hidden = hidden_units(jnp.concatenate([text, probes], axis=1), weights)
    kept = choose_units(hidden[:, num_text:], is_probe, reduction.kept_units(weights.gate.shape[0]))
    text = jnp.einsum("BXF,FD->BXD", hidden[:, :num_text], weights.down)
    units = kept.units if imposed is None else imposed
    visual = jax.vmap(reduced_ffn, in_axes=(0, None, 0))(visual, weights, units)
    return jnp.concatenate([text, visual], axis=1), kept


def reduced_ffn(x: Float[Array, "P D"], weights: FfnWeights, units: Int[Array, " U"]) -> Float[Array, "P D"]:
    """One sample's visual tokens through the chosen units only."""
    gate, up, down = weights.gate[units], weights.up[units], weights.down[units]
    hidden = jax.nn.silu(jnp.einsum("PD,UD->PU", x, gate)) * jnp.einsum("PD,UD->PU", x, up)
    return jnp.einsum("PU,UD->PD", hidden, down)
