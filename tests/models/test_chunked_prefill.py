"""A prefill in chunks computes the same as one in a piece, in less memory."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.layout import TokenLayout
from rlens_jax.models.decoder import Decoder
from rlens_jax.plans import Plan, Reduction
from tests.numerics import assert_close, error
from tests.sequences import fork, forked_layout, make_layout, pack, random_rows, run_length, unpack
from tests.toy_decoder import TOY, random_decoder

pytestmark = pytest.mark.slow

CONFIG = replace(TOY, num_layers=3)
REDUCTION = Reduction(attention_range=3, active_fraction=0.3, probe_fraction=0.4)
RAGGED = [
    fork(run_length(3, 31, 5), [9, 1, 70]),
    fork(run_length(2, 7, 140, 11, 6), [4]),
    fork(run_length(7), []),
    fork(run_length(1, 1, 1), [3, 5]),
]
"""Rows with three branches, one, none and two."""
PLANS = [Plan(), Plan(attention=(1, 2), ffn=(0, 1, 2))]
CHUNKS = (7, 64)
"""Text slots, visual slots and probes all in parts, and the text alone."""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, 0.2)


@partial(jax.jit, static_argnames=("graph", "plan", "chunk"))
def run(graph, state, x, layout: TokenLayout, plan: Plan, chunk: int | None):
    decoder = nnx.merge(graph, state)
    context = decoder.context(layout, layout.slots.position[:, None], jax.random.key(7), chunk=chunk)
    x, record = decoder.prefill(x, context, plan, REDUCTION)
    return decoder.logits(x), record


@pytest.mark.parametrize("plan", PLANS, ids=Plan.label)
def test_same_numbers(decoder: Decoder, plan: Plan) -> None:
    layout = forked_layout(RAGGED, spare=(2, 3))
    x = jnp.asarray(pack(random_rows(np.random.default_rng(2), [row.is_visual for row in RAGGED], CONFIG.width), layout))
    logits, record = run(*nnx.split(decoder), x, layout, plan, None)
    assert float(logits.std()) > 0.5
    for chunk in CHUNKS:
        chunked, same = run(*nnx.split(decoder), x, layout, plan, chunk)
        for ours, plain in zip(unpack(chunked, layout), unpack(logits, layout), strict=True):
            assert_close(ours, plain, 1e-5)
        # Empty slots see no key, so that what is in them is nobody's business.
        for made, expected in ((same.k, record.k), (same.v, record.v)):
            for ours, plain in zip(made.swapaxes(2, 3), expected.swapaxes(2, 3), strict=True):
                for tokens in zip(unpack(ours, layout), unpack(plain, layout), strict=True):
                    assert_close(*tokens, 1e-5)
        with_images = np.asarray(layout.num_visual) > 0
        np.testing.assert_array_equal(same.kept.units[:, with_images], record.kept.units[:, with_images])
        assert same.kept.scored.all()
    if plan != Plan():
        dense, _ = run(*nnx.split(decoder), x, layout, Plan(), None)
        assert error(unpack(logits, layout)[0], unpack(dense, layout)[0]) > 1e-2


@pytest.mark.parametrize("plan", [Plan(), Plan(ffn=(0,)), Plan((0,), (0,))], ids=Plan.label)
def test_less_memory(plan: Plan) -> None:
    """The FFN's hidden units are what is large: 8 times as wide as the states here."""
    config = replace(CONFIG, num_layers=1, width=32, num_heads=2, num_kv_heads=1, ffn_width=2048)
    masks = [run_length(64, 960, 64)]
    layout = make_layout(masks)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((1, layout.bucket.slots, config.width), jnp.float32)
    temporary = {
        chunk: run.lower(graph, state, x, layout, plan, chunk).compile().memory_analysis().temp_size_in_bytes
        for chunk in (None, 64)
    }
    assert temporary[64] < 0.6 * temporary[None], temporary
