"""Attention block by block in loops is the plain one, for ragged samples and blocks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.layout import PADDING_POSITION
from rlens_jax.ops.attention import chunked_attention, reference_attention
from tests.numerics import assert_close
from tests.sequences import make_layout, run_length

RAGGED = [run_length(3, 31, 5), run_length(2, 7, 140, 11, 6), run_length(7), run_length(1, 1, 1)]


@pytest.mark.parametrize(
    ("attention_range", "window", "block"),
    [(None, "ordinal", 7), (3, "ordinal", 128), (3, "position", 7), (100, "ordinal", 7)],
)
def test_same_as_the_reference(attention_range: int | None, window: str, block: int) -> None:
    layout = make_layout(RAGGED, spare=(2, 3))
    rng = np.random.default_rng(0)
    shapes = [(4, heads, layout.bucket.slots, 4) for heads in (6, 2, 2)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    run = jax.jit(lambda *arrays: chunked_attention(*arrays, attention_range, window, block))
    real = np.asarray(layout.slots.position) < PADDING_POSITION
    ours, expected = (
        np.asarray(made).swapaxes(1, 2)[real]
        for made in (run(q, k, v, layout), reference_attention(q, k, v, layout, attention_range, window))
    )
    assert_close(ours, expected, 1e-6)
