import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rlens_jax.ops import row_gather
from rlens_jax.ops.ffn import FfnWeights, RowStore, dense_ffn, dynamic_ffn, reduced_ffn
from rlens_jax.plan import Reduction
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length

WIDTH, UNITS, LAYERS = 16, 24, 2
KEY = jax.random.key(0)


def make_weights(seed: int, layers: int = LAYERS) -> FfnWeights:
    """Of all layers, stored for the kernel: [layers, F, 2, D / 2]."""
    rng = np.random.default_rng(seed)
    shape = (layers, UNITS, 2, WIDTH // 2)
    return FfnWeights(*(jnp.asarray(rng.standard_normal(shape) / 3, jnp.bfloat16) for _ in range(3)))


def one_layer(weights: FfnWeights, layer: int) -> FfnWeights:
    return jax.tree.map(lambda w: w[layer], weights)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows, blocks of 16 tokens and passes of 8 rows, so that a small example has several of each."""
    monkeypatch.setattr(row_gather, "TILE", 4)
    monkeypatch.setattr(row_gather, "BLOCK", 16)
    monkeypatch.setattr(row_gather, "MOST_BYTES", 8 * 6 * WIDTH)


def test_equals_the_plain_gather(small_tiles):
    rng, weights = np.random.default_rng(0), make_weights(1)
    x = jnp.asarray(rng.standard_normal((4, 21, WIDTH)), jnp.bfloat16)
    rows = jnp.asarray(np.stack([np.sort(rng.permutation(UNITS)[:14]) for _ in range(4)]), jnp.int32)
    count = jnp.array([14, 3, 0, 8], jnp.int32)
    stored = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), weights)
    with pltpu.force_tpu_interpret_mode():
        y = row_gather.fetched_ffn(x, stored.gate, stored.up, stored.down, UNITS + rows, count)
    layer = one_layer(weights, 1)
    for sample, number in enumerate(count.tolist()):
        expected = reduced_ffn(x[sample], layer, rows[sample, :number])
        assert_close(y[sample], np.asarray(expected, np.float32), 2e-2)
        assert number == 0 or np.abs(np.asarray(expected, np.float32)).max() > 0.5


def test_a_layer_with_the_kernel_equals_one_without(small_tiles):
    masks = [run_length(3, 21, 2), run_length(2, 9, 1, 5), run_length(4)]
    layout, weights, reduction = (
        make_layout(masks, spare=(1, 2)),
        make_weights(2),
        Reduction(active_fraction=0.5),
    )
    x = jnp.asarray(pack(random_rows(np.random.default_rng(3), masks, WIDTH), layout), jnp.bfloat16)
    layer = one_layer(weights, 1)
    with pltpu.force_tpu_interpret_mode():
        y, kept = dynamic_ffn(x, layer, layout, reduction, KEY, store=RowStore(weights, jnp.int32(1)))
    expected, chosen = dynamic_ffn(x, layer, layout, reduction, KEY)
    np.testing.assert_array_equal(kept.units, chosen.units)
    assert_close(y, np.asarray(expected, np.float32), 2e-2)
    assert np.abs(np.asarray(expected - dense_ffn(x, layer), np.float32)).max() > 0.1


def test_both_forms_of_weights_are_the_same_ffn():
    masks = [run_length(3, 21, 2)]
    layout, halves = make_layout(masks), one_layer(make_weights(4), 0)
    rows = jax.tree.map(lambda w: w.reshape(UNITS, WIDTH), halves)
    x = jnp.asarray(pack(random_rows(np.random.default_rng(5), masks, WIDTH), layout), jnp.bfloat16)
    for ffn in (dense_ffn, lambda *a: dynamic_ffn(*a, layout, Reduction(), KEY)[0]):
        np.testing.assert_array_equal(ffn(x, halves), ffn(x, rows))
