"""The Dynamic FFN over a mesh axis of up to eight simulated devices."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from rlens_jax.layout import TokenLayout
from rlens_jax.ops.ffn import HEADROOM, FfnWeights, Kept, dense_ffn, dynamic_ffn, shard_capacity
from rlens_jax.plans import Reduction
from rlens_jax.sharding.model_axis import sum_over_shards
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length

WIDTH, UNITS = 12, 88
MASKS = [run_length(3, 41, 5), run_length(2, 17, 4, 23, 1, 11, 6), run_length(7), run_length(1, 1, 1)]
"""Ragged: one sample with several images, one without any, one with a single visual token."""
LAYOUT = make_layout(MASKS, spare=(2, 3), samples=[5, 0, 7, 2])
KEY = jax.random.key(3)
REDUCTION = Reduction(active_fraction=0.125)
"""11 of 88 units: as many as one of eight shards owns, and at most two of them fit its capacity."""
SHARDS = (1, 2, 4, 8)
WEIGHTS = Spec("model")


def make_weights(seed: int) -> FfnWeights:
    rng = np.random.default_rng(seed)
    return FfnWeights(*(jnp.asarray(rng.standard_normal((UNITS, WIDTH)) / 3, jnp.float32) for _ in range(3)))


def make_states(seed: int) -> jax.Array:
    return jnp.asarray(pack(random_rows(np.random.default_rng(seed), MASKS, WIDTH), LAYOUT))


def mesh_of(shards: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:shards]), ("model",))


@cache
def over_shards(shards: int, reduction: Reduction):
    """The sharded FFN as one compiled function; what each shard says it kept comes back one row of shards."""

    def local(x: jax.Array, weights: FfnWeights, layout: TokenLayout, imposed: jax.Array | None):
        y, kept = dynamic_ffn(x, weights, layout, reduction, KEY, imposed)
        return jax.lax.psum(y, "model"), jax.tree.map(lambda a: a[None], kept)

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh_of(shards),
            in_specs=(Spec(), WEIGHTS, Spec(), Spec()),
            out_specs=(Spec(), Spec("model")),
            check_vma=False,
        )
    )


@cache
def whole(reduction: Reduction):
    return jax.jit(lambda x, weights, layout, imposed: dynamic_ffn(x, weights, layout, reduction, KEY, imposed))


def assert_equals_one_device(
    shards: int, x: jax.Array, weights: FfnWeights, reduction: Reduction = REDUCTION, imposed: jax.Array | None = None
) -> Kept:
    """States within 1e-5, and the same units in the same order on every shard; returns the units."""
    expected, kept = whole(reduction)(x, weights, LAYOUT, imposed)
    y, chosen = over_shards(shards, reduction)(x, weights, LAYOUT, imposed)
    assert_close(y, expected, 1e-5)
    for shard in range(shards):
        np.testing.assert_array_equal(chosen.units[shard], kept.units)
        np.testing.assert_array_equal(chosen.scored[shard], kept.scored)
    return kept


@pytest.mark.parametrize("shards", SHARDS)
def test_strided_probes_choose_globally(shards: int) -> None:
    kept = assert_equals_one_device(shards, make_states(0), make_weights(1))
    per_shard = np.stack([np.bincount(row // 11, minlength=8) for row in np.asarray(kept.units)])
    assert per_shard.min() == 0
    assert per_shard.max() > 3, "the units are spread evenly: choose another seed"


@pytest.mark.parametrize("shards", [1, 4])
def test_random_probes_choose_globally(shards: int) -> None:
    reduction = Reduction(active_fraction=0.3, probe="random", probe_fraction=0.3)
    assert_equals_one_device(shards, make_states(0), make_weights(1), reduction)


@pytest.mark.parametrize("shards", SHARDS)
def test_one_shard_owns_all_units(shards: int) -> None:
    """Eleven units of shard 5 of 8 (of the second half, of the third quarter) are louder than all others."""
    weights = make_weights(2)
    loud = replace(weights, up=weights.up.at[55:66].mul(1e4))
    kept = assert_equals_one_device(shards, make_states(3), loud)
    with_probes = np.asarray(kept.units)[[0, 1, 3]]
    assert (np.sort(with_probes, axis=1) == np.arange(55, 66)).all(), "the example is not one-sided"


@pytest.mark.parametrize("shards", SHARDS)
def test_ties_go_to_the_lower_unit(shards: int) -> None:
    """The same eleven units on each of eight shards: of equal scores those of the lower shards are kept."""
    weights = jax.tree.map(lambda w: jnp.tile(w[:11], (8, 1)), make_weights(4))
    kept = assert_equals_one_device(shards, make_states(5), weights)
    units = np.asarray(kept.units)[0].tolist()
    assert {unit // 11 for unit in units} == set(range(8))
    assert all(unit - 11 in units for unit in units if unit >= 11)
    assert any(unit + 11 not in units for unit in units if unit < 77)


@pytest.mark.parametrize("shards", [1, 4])
def test_imposed_units(shards: int) -> None:
    rng = np.random.default_rng(6)
    imposed = jnp.asarray(np.stack([rng.permutation(UNITS)[:11] for _ in MASKS]), jnp.int32)
    x, weights = make_states(6), make_weights(7)
    assert_equals_one_device(shards, x, weights, imposed=imposed)
    y, kept = whole(REDUCTION)(x, weights, LAYOUT, imposed)
    free, chosen = whole(REDUCTION)(x, weights, LAYOUT, None)
    np.testing.assert_array_equal(kept.units, chosen.units)
    assert np.abs(np.asarray(y - free)).max() > 1e-2


def test_a_score_that_is_no_number_is_marked_on_every_shard() -> None:
    """A probe that is no number, and one unit of shard 7 that overflows for one sample: marked for that sample by all shards."""
    x, weights = make_states(9), make_weights(8)
    poisoned = x.at[1, LAYOUT.bucket.text].set(np.nan)  # ordinal 0 is a probe
    y, kept = over_shards(8, REDUCTION)(poisoned, weights, LAYOUT, None)
    assert kept.scored.tolist() == [[True, False, True, True]] * 8
    clean, _ = whole(REDUCTION)(x, weights, LAYOUT, None)
    np.testing.assert_allclose(y[2:], clean[2:], rtol=0, atol=1e-5)
    only_first = x.at[:, :, 0].set(0.0).at[0, :, 0].set(10.0)
    huge = replace(weights, up=weights.up.at[80].set(0.0).at[80, 0].set(3e38))
    _, kept = over_shards(8, REDUCTION)(only_first, huge, LAYOUT, None)
    assert kept.scored.tolist() == [[False, True, True, True]] * 8


def layer_loop(reduction: Reduction):
    """Two layers, the first dense and the second dynamic, by a flag that is data."""

    def run(x, stack, layout, flags):
        def body(x, layer):
            flag, weights = layer
            dynamic = lambda: dynamic_ffn(x, weights, layout, reduction, KEY)[0]  # noqa: E731
            dense = lambda: dense_ffn(x, weights)  # noqa: E731
            return x + sum_over_shards(jax.lax.cond(flag, dynamic, dense)), None

        return jax.lax.scan(body, x, (flags, stack))[0]

    return run


def test_inside_a_traced_layer_loop() -> None:
    stack = jax.tree.map(lambda *w: jnp.stack(w), make_weights(10), make_weights(11))
    x = make_states(12)
    sharded = jax.jit(
        jax.shard_map(
            layer_loop(REDUCTION),
            mesh=mesh_of(4),
            in_specs=(Spec(), Spec(None, "model"), Spec(), Spec()),
            out_specs=Spec(),
            check_vma=False,
        )
    )
    plain = jax.jit(layer_loop(REDUCTION))
    results = []
    for flags in ([False, True], [True, True], [False, False]):
        expected = plain(x, stack, LAYOUT, jnp.array(flags))
        assert_close(sharded(x, stack, LAYOUT, jnp.array(flags)), expected, 1e-5)
        results.append(np.asarray(expected))
    assert np.abs(results[0] - results[1]).max() > 1e-2
    assert np.abs(results[0] - results[2]).max() > 1e-2


def test_no_weights_cross_the_interconnect() -> None:
    """The scores are gathered and the states summed; no result of a collective has the size of a weight or a row of units."""
    x, weights = make_states(0), make_weights(1)
    text = over_shards(4, REDUCTION).lower(x, weights, LAYOUT, None).compile().as_text()
    found = re.findall(r"= \(?(\w+\[[\d,]*\]).*? (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    states = f"f32[4,{LAYOUT.bucket.slots},{WIDTH}]"
    assert sorted(found) == sorted([(f"f32[4,{UNITS}]", "all-gather"), (states, "all-reduce")]), found


def test_one_shard_compiles_no_loop() -> None:
    """A part of one is the plain program, without a loop; a part of four has the loop of tiles."""
    x, weights = make_states(0), make_weights(1)
    text = {n: over_shards(n, REDUCTION).lower(x, weights, LAYOUT, None).as_text() for n in (1, 4)}
    assert "stablehlo.while" not in text[1]
    assert "stablehlo.while" in text[4]


@pytest.mark.parametrize(
    ("width", "shards", "capacity"),
    [
        (18944, 1, 3789),  # Qwen2-VL-7B
        (18944, 4, 1024),
        (18944, 8, 512),
        (14336, 8, 384),  # InternVL2-8B
        (8960, 2, 1024),
        (64, 4, 4),
        (4, 8, 1),
    ],
)
def test_capacity_is_the_even_share_and_a_little(width, shards, capacity):
    assert shard_capacity(Reduction().kept_units(width), shards, HEADROOM) == capacity
