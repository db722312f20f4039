import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rlens_jax.ops import row_gather
from rlens_jax.ops.ffn import FfnWeights, reduced_ffn
from tests.numerics import assert_close

WIDTH, UNITS, LAYERS = 16, 24, 2


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows, blocks of 16 tokens and passes of 8 rows, so that a small example has several of each."""
    monkeypatch.setattr(row_gather, "TILE", 4)
    monkeypatch.setattr(row_gather, "BLOCK", 16)
    monkeypatch.setattr(row_gather, "MOST_BYTES", 8 * 6 * WIDTH)


def test_equals_the_plain_gather(small_tiles):
    rng = np.random.default_rng(0)
    shape = (LAYERS * UNITS, 2, WIDTH // 2)
    stack = [jnp.asarray(rng.standard_normal(shape) / 3, jnp.bfloat16) for _ in range(3)]
    x = jnp.asarray(rng.standard_normal((4, 21, WIDTH)), jnp.bfloat16)
    rows = jnp.asarray(np.stack([np.sort(rng.permutation(UNITS)[:14]) for _ in range(4)]), jnp.int32)
    count = jnp.array([14, 3, 0, 8], jnp.int32)
    with pltpu.force_tpu_interpret_mode():
        y = row_gather.fetched_ffn(x, *stack, UNITS + rows, count, 8)
    layer = FfnWeights(*(matrix[UNITS:].reshape(UNITS, WIDTH) for matrix in stack))
    for sample, number in enumerate(count.tolist()):
        expected = reduced_ffn(x[sample], layer, rows[sample, :number])
        assert_close(y[sample], np.asarray(expected, np.float32), 2e-2)
        assert number == 0 or np.abs(np.asarray(expected, np.float32)).max() > 0.5
