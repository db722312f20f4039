"""FFN units stored as half rows against the same units as [F, D], and the kernel that fetches them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rlens_jax.ops import ffn, ffn_tpu
from rlens_jax.ops.ffn import FfnWeights, dense_ffn, dynamic_ffn, reduced_ffn, simulated_dynamic_ffn
from rlens_jax.ops.ffn_paths import FfnWay, Ways
from rlens_jax.ops.ffn_tpu import HalvedStack, HalvedUnits, part_size
from rlens_jax.plans import Reduction
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length

pytestmark = pytest.mark.slow

WIDTH, UNITS, LAYERS = 16, 24, 2
KEY = jax.random.key(0)
MASKS = [run_length(3, 21, 2), run_length(2, 9, 1, 5), run_length(4)]
LAYOUT = make_layout(MASKS, spare=(1, 2))
REDUCTION = Reduction(active_fraction=0.5, probe_fraction=0.3)


def make_both(seed: int, dtype: type) -> tuple[HalvedUnits, FfnWeights]:
    """The last of two layers in both forms."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, UNITS, 2, WIDTH // 2)
    stack = HalvedStack(*(jnp.asarray(rng.standard_normal(shape) / 3, dtype) for _ in range(3)))
    rows = jax.tree.map(lambda matrix: matrix[1].reshape(UNITS, WIDTH), stack)
    return HalvedUnits(stack, jnp.int32(1)), FfnWeights(rows.gate, rows.up, rows.down)


def make_states(seed: int, dtype: type) -> jax.Array:
    return jnp.asarray(pack(random_rows(np.random.default_rng(seed), MASKS, WIDTH), LAYOUT), dtype)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 units in float32; tiles of 4 rows, blocks of 16 tokens, passes of 8 rows: several of each in a small example."""
    monkeypatch.setattr(ffn_tpu, "PART_BYTES", 8 * WIDTH * 4)
    monkeypatch.setattr(ffn_tpu, "TILE", 4)
    monkeypatch.setattr(ffn_tpu, "BLOCK", 16)
    monkeypatch.setattr(ffn_tpu, "MAX_ROW_BYTES", 8 * 6 * WIDTH)


@pytest.fixture(params=[10**6, 0], ids=["part by part", "at once"])
def max_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few tokens that parts of the units are taken, and so many that they are not."""
    monkeypatch.setattr(ffn_tpu, "MAX_TOKENS", request.param)


@pytest.mark.usefixtures("small_parts", "max_tokens")
@pytest.mark.parametrize("chunk", [None, 7])
def test_all_units(chunk: int | None) -> None:
    halved, weights = make_both(0, jnp.float32)
    x = make_states(1, jnp.float32)
    expected = np.asarray(dense_ffn(x, weights))
    assert np.abs(expected).max() > 1
    assert_close(dense_ffn(x, halved, chunk), expected, 1e-5)
    assert_close(halved.output(halved.hidden(x)), expected, 1e-5)


@pytest.mark.usefixtures("small_parts", "max_tokens")
def test_text_and_scores() -> None:
    halved, weights = make_both(2, jnp.float32)
    x = make_states(3, jnp.float32)
    is_probe = jnp.asarray([[True] * 4, [True, True, False, False], [False] * 4])
    y, scores = halved.text_and_scores(x, is_probe)
    expected, expected_scores = weights.text_and_scores(x, is_probe)
    assert y.shape[1] == x.shape[1] - 4
    assert_close(y, np.asarray(expected), 1e-5)
    assert_close(scores, np.asarray(expected_scores), 1e-5)
    for chunk in (1, 3, 100):
        assert_close(halved.scores(x[:, -4:], is_probe, chunk), np.asarray(expected_scores), 1e-5)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("way", "chunk", "dtype", "tolerance"),
    [
        ("kernel", None, jnp.float32, 1e-5),
        ("kernel", 7, jnp.bfloat16, 2e-2),
        ("masked", None, jnp.float32, 1e-5),
        ("masked", 7, jnp.float32, 1e-5),
    ],
)
def test_a_reduced_layer(way: FfnWay, chunk: int | None, dtype: type, tolerance: float) -> None:
    halved, weights = make_both(4, dtype)
    x = make_states(5, dtype)
    with pltpu.force_tpu_interpret_mode():
        y, kept = dynamic_ffn(x, replace(halved, ways=Ways((way,))), LAYOUT, REDUCTION, KEY, chunk=chunk)
    expected, chosen = simulated_dynamic_ffn(x, weights, LAYOUT, REDUCTION, KEY)
    has_images = np.asarray(LAYOUT.num_visual) > 0
    np.testing.assert_array_equal(kept.units[has_images], chosen.units[has_images])
    assert_close(y[has_images], np.asarray(expected[has_images], np.float32), tolerance)
    assert np.abs(np.asarray(expected - dense_ffn(x, weights), np.float32)).max() > 0.1


@pytest.mark.usefixtures("small_parts")
def test_a_shard_that_owns_more_units_than_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four shards, where a sample keeps 12 units: room for 8 rows, and two more tiles of 4 in a loop."""
    monkeypatch.setattr(ffn, "TILE", 4)
    monkeypatch.setattr(ffn_tpu, "num_shards", lambda: 4)
    halved, weights = make_both(6, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(7).standard_normal((3, 21, WIDTH)), jnp.bfloat16)
    owned = (14, 5, 9)
    draw = np.random.default_rng(8)
    rows = np.full((3, UNITS), UNITS, np.int32)
    for row, number in zip(rows, owned, strict=True):
        row[:number] = np.sort(draw.permutation(UNITS)[:number])
    with pltpu.force_tpu_interpret_mode():
        y = jax.jit(lambda x, rows: halved.through_rows(x, rows, 12))(x, jnp.asarray(rows))
    assert ffn_tpu.shard_capacity(12, 4, ffn_tpu.HEADROOM) == 8
    for sample, number in enumerate(owned):
        expected = reduced_ffn(x[sample], weights, jnp.asarray(rows[sample, :number]))
        assert_close(y[sample], np.asarray(expected, np.float32), 2e-2)
        first_eight = reduced_ffn(x[sample], weights, jnp.asarray(rows[sample, :8]))
        if number > 8:
            assert np.abs(np.asarray(expected - first_eight, np.float32)).max() > 0.1


@pytest.mark.usefixtures("small_parts")
def test_the_kernel_equals_the_plain_gather() -> None:
    rng = np.random.default_rng(0)
    shape = (LAYERS * UNITS, 2, WIDTH // 2)
    stack = [jnp.asarray(rng.standard_normal(shape) / 3, jnp.bfloat16) for _ in range(3)]
    x = jnp.asarray(rng.standard_normal((4, 21, WIDTH)), jnp.bfloat16)
    rows = jnp.asarray(np.stack([np.sort(rng.permutation(UNITS)[:14]) for _ in range(4)]), jnp.int32)
    count = jnp.array([14, 3, 0, 8], jnp.int32)
    with pltpu.force_tpu_interpret_mode():
        y = ffn_tpu.fetched_ffn(x, stack, UNITS + rows, count, 8)
    layer = FfnWeights(*(matrix[UNITS:].reshape(UNITS, WIDTH) for matrix in stack))
    for sample, number in enumerate(count.tolist()):
        expected = reduced_ffn(x[sample], layer, rows[sample, :number])
        assert_close(y[sample], np.asarray(expected, np.float32), 2e-2)
        assert number == 0 or np.abs(np.asarray(expected, np.float32)).max() > 0.5


@pytest.mark.parametrize(
    ("units", "most", "size"),
    [(18944, 2486, 2368), (4736, 2486, 2368), (3584, 2176, 1792), (37, 36, 1), (16, 100, 16), (16, 0, 1)],
)
def test_parts_divide_the_units(units: int, most: int, size: int) -> None:
    assert part_size(units, most) == size
