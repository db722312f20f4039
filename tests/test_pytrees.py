"""Pytrees are checked when user code makes them, not when JAX rebuilds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlens_jax.layout import Slots, TokenLayout
from rlens_jax.models.decoder import Context, KVCache, LayerRecord, TracedPlan
from rlens_jax.ops.ffn import FfnWeights, Kept
from rlens_jax.ops.ffn_tpu import HalvedStack
from rlens_jax.pytrees import unchecked
from tests.sequences import make_layout, run_length

LAYOUT = make_layout([run_length(2, 7, 3), run_length(4, 1)])
ROTARY = (jnp.zeros((2, LAYOUT.bucket.slots, 4)),) * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Slots(jnp.zeros((2, 5), int), jnp.zeros((2, 6), int), jnp.zeros((2, 5), int)),
        lambda: TokenLayout(*(np.zeros(shape, np.int32) for shape in ((2, 5), (2, 7), (2, 5), (2,), (3,), (2,)))),
        lambda: Kept(jnp.zeros((2, 5), int), jnp.ones(3, bool)),
        lambda: FfnWeights(jnp.zeros((7, 4)), jnp.zeros((7, 4)), jnp.zeros((4, 7))),
        lambda: HalvedStack(*(jnp.zeros((3, 7, 4, 2)),) * 3),
        lambda: TracedPlan(jnp.zeros(5, int), jnp.zeros(6, int)),
        lambda: TracedPlan(jnp.zeros(5), jnp.zeros(5)),
        lambda: KVCache(
            *[jnp.zeros((2, 1, 9, 4))] * 2, *[jnp.zeros((2, 8), int)] * 2, jnp.zeros((2, 3), int), *[jnp.zeros(3, int)] * 2
        ),
        lambda: LayerRecord(jnp.zeros((2, 1, 9, 4)), jnp.zeros((2, 1, 9, 4)), jnp.zeros((2, 5), int)),
        lambda: Context(LAYOUT, (ROTARY[0], ROTARY[1][:, 1:]), jax.random.key(0)),
    ],
    ids=["Slots", "TokenLayout", "Kept", "FfnWeights", "HalvedStack", "TracedPlan", "dtype", "KVCache", "LayerRecord", "Context"],
)
def test_a_wrong_shape_is_refused(make):
    with pytest.raises(TypeError, match="Type-check error"):
        make()


def test_jax_rebuilds_a_pytree_from_anything():
    slots = LAYOUT.slots
    specs = jax.tree.map(lambda _: PartitionSpec("work"), slots)
    assert isinstance(specs, Slots)
    assert specs.position == PartitionSpec("work")
    mapped = jax.vmap(lambda row: row.position.sum() + row.ordinal.sum())(slots)
    np.testing.assert_array_equal(mapped, slots.position.sum(axis=1) + slots.ordinal.sum(axis=1))


def test_a_prefix_of_a_tree_maps_over_it():
    prefix = unchecked(KVCache, k=0, v=1, position=0, branch=0, shift=0, start=None, stop=None)
    rows, layers = [jnp.zeros((2, 9), int)] * 2, [jnp.zeros(3, int)] * 2
    cache = KVCache(jnp.zeros((2, 2, 9, 4)), jnp.ones((2, 2, 9, 4)), *rows, jnp.zeros((2, 3), int), *layers)
    total = jax.vmap(lambda row: row.v.sum(), in_axes=(prefix,))(cache)
    np.testing.assert_array_equal(total, [2 * 9 * 4] * 2)


def test_static_fields_are_structure():
    plain, chunked = (Context(LAYOUT, ROTARY, jax.random.key(0), chunk=chunk) for chunk in (None, 8))
    assert jax.tree.structure(plain) != jax.tree.structure(chunked)
    rebuilt = jax.jit(lambda context: context)(chunked)
    assert (rebuilt.chunk, rebuilt.kernel, rebuilt.halved) == (8, "packed", None)
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(chunked)[0]
    assert jax.tree_util.keystr(path) == ".layout.text_position"
