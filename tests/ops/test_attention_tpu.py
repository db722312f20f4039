"""What is particular to the TPU's attention, run by Pallas' interpreters on the CPU; its contract is in test_attention.py."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from rlens_jax.layout import Bucket, Slots, visible
from rlens_jax.ops.attention import attend, reference_attention
from rlens_jax.ops.attention_tpu import block_size, kernel_flops, splash_attention, visited_blocks
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length, unpack

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
RAGGED = [run_length(3, 271, 5), run_length(2, 101, 4, 61, 1, 131, 37), run_length(7), run_length(1, 1, 1)]
"""One image; three images with text between, of odd lengths; no image; one visual token. Blocks have 128 slots or more."""


def packed_qkv(seed: int, masks, layout, padding=np.zeros):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(pack(random_rows(rng, masks, heads, HEAD_DIM), layout, padding).swapaxes(1, 2))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@functools.cache
def compiled(*options):
    """One program for all tests with these options and shapes."""
    return jax.jit(lambda q, k, v, layout: splash_attention(q, k, v, layout, *options, interpret=True))


def assert_rows_close(actual, expected, layout, tolerance: float) -> None:
    for ours, theirs in zip(*(unpack(x.swapaxes(1, 2), layout) for x in (actual, expected)), strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("attention_range", [None, 131])
def test_padding_and_tokens_never_meet(attention_range):
    """Real rows are the same bits whatever the padding holds, up to sums that overflow; and the other way round."""
    layout = make_layout(RAGGED, spare=(2, 3))
    run = compiled(attention_range, "ordinal", 128)
    rng = np.random.default_rng(3)
    scales = (1e15, 1e15, 3e38)

    def garbage(scale):
        return lambda shape: (scale * rng.choice([-1.0, 1.0], shape)).astype(np.float32)

    clean = run(*packed_qkv(2, RAGGED, layout), layout)
    dirty = run(*(packed_qkv(2, RAGGED, layout, garbage(scale))[i] for i, scale in enumerate(scales)), layout)
    for ours, expected in zip(*(unpack(x.swapaxes(1, 2), layout) for x in (dirty, clean)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    other = run(*packed_qkv(4, RAGGED, layout), layout)
    empty = np.concatenate(
        [
            np.arange(slots) >= np.asarray(used)[:, None]
            for slots, used in zip((layout.bucket.text, layout.bucket.visual), (layout.num_text, layout.num_visual), strict=True)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(*(np.asarray(x).swapaxes(1, 2)[empty] for x in (other, clean)))


def test_text_blocks_after_the_image_are_not_touched():
    """A question of several blocks behind the image costs its visual tokens nothing: even NaN there does not reach them."""
    masks = [run_length(5, 131, 299)]
    layout = make_layout(masks)
    q, k, v = packed_qkv(7, masks, layout)
    unseen = v.at[:, :, 128 : layout.bucket.text].set(jnp.nan)
    run = compiled(131, "ordinal", 128)
    visual = slice(layout.bucket.text, None)
    np.testing.assert_array_equal(run(q, k, unseen, layout)[:, :, visual], run(q, k, v, layout)[:, :, visual])


def test_runs_in_the_interpreter_of_tpu_memory():
    """The stricter interpreter, which simulates the chip's memories, through the door that the decoder uses."""
    masks = [run_length(2, 131, 3, 29, 1)]
    layout = make_layout(masks)
    # It is slow, so one kv head only.
    q, k, v = (x[:, : x.shape[1] // KV_HEADS] for x in packed_qkv(6, masks, layout))
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(lambda q, k, v, layout: attend(q, k, v, layout, 17, kernel="splash"))(q, k, v, layout)
    assert_rows_close(ours, reference_attention(q, k, v, layout, 17), layout, 1e-5)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(layout, attention_range, dtype=jnp.float32, **options):
    """All equations of `attend`, those inside kernels too."""
    slots = layout.bucket.slots
    q, k, v = (jnp.zeros((1, heads, slots, HEAD_DIM), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    jaxpr = jax.make_jaxpr(lambda *x: attend(*x, attention_range, **options))(q, k, v, layout)
    return list(equations(jaxpr.jaxpr))


def kernel_calls(found):
    return [equation for equation in found if equation.primitive.name == "pallas_call"]


@pytest.mark.parametrize("attention_range", [None, 31])
def test_the_caller_names_the_kernel(attention_range):
    layout = make_layout([run_length(3, 131, 2)])
    assert not kernel_calls(traced(layout, attention_range, kernel="packed"))
    # Text and visual queries, each with their own run and the other.
    assert len(kernel_calls(traced(layout, attention_range, kernel="splash"))) == 4
    # The text of branches and of their trunks.
    assert len(kernel_calls(traced(replace(layout, max_branches=2), attention_range, kernel="splash"))) == 5


@pytest.mark.parametrize("setting", ["default", "highest"])
def test_the_precision_of_products_follows_the_dtype_alone(setting):
    """On a TPU float32 factors are rounded to bfloat16 unless told otherwise; bfloat16 ones need no more."""
    layout = make_layout([run_length(3, 131, 2)])
    exact = (jax.lax.Precision.HIGHEST,) * 2
    with jax.default_matmul_precision(setting):
        for dtype in (jnp.float32, jnp.bfloat16):
            found = traced(layout, 31, kernel="splash", dtype=dtype)
            products = [equation for equation in found if equation.primitive.name == "dot_general"]
            # Scores and values, in each of four calls.
            assert [x.params["precision"] == exact for x in products] == [dtype == jnp.float32] * 8


@pytest.mark.parametrize("attention_range", [None, 31])
def test_forms_no_square_of_the_visual_tokens_and_no_repeated_keys(attention_range):
    num_visual = 2003
    layout = make_layout([run_length(300, num_visual, 6)])
    found = traced(layout, attention_range, kernel="splash")
    shapes = {variable.aval.shape for equation in found for variable in equation.outvars}
    # Nor of visual and text tokens; what is larger than a block is a run or all slots, once.
    assert not [shape for shape in shapes if max(shape, default=0) > 512 and sum(size >= 300 for size in shape) > 1]
    for call in kernel_calls(found):
        heads = [x.aval.shape[0] for x in call.invars if x.aval.dtype == jnp.float32 and x.aval.shape[-1] == HEAD_DIM]
        assert heads == [HEADS // KV_HEADS, 1, 1]


@pytest.mark.parametrize(
    ("num_visual", "attention_range", "block"),
    [(1, None, 128), (131, 1, 128), (640, 129, 128), (641, 130, 128), (1664, 256, 256), (1664, None, 512), (512, 600, 256)],
)
def test_visited_blocks_are_those_with_something_to_see(num_visual, attention_range, block):
    size = block_size(num_visual, attention_range, block)
    length = -(-num_visual // size) * size
    slot = jnp.arange(length, dtype=jnp.int32)[None]
    slots = Slots(slot, slot, jnp.zeros_like(slot))

    def count(band):
        seen = np.asarray(visible(slots, slots, band))[0]
        return seen.reshape(length // size, size, length // size, size).any(axis=(1, 3)).sum()

    found = visited_blocks(num_visual, attention_range, block)
    assert found == (count(attention_range), count(None), size)


def test_the_share_of_blocks_at_the_sizes_of_the_paper():
    """R = 256: two blocks of 256 keys a block of queries, instead of all before it."""
    assert visited_blocks(1664, 256) == (13, 28, 256)
    assert visited_blocks(4096, 256) == (31, 136, 256)
    assert visited_blocks(4096, None) == (36, 36, 512)
    assert visited_blocks(0, 256)[:2] == (0, 0)


def test_flops_count_whole_blocks():
    # Text with itself, 13 visited blocks, and text with visual slots both ways.
    pairs = 384**2 + 13 * 256**2 + 2 * 384 * 1792
    assert kernel_flops(Bucket(text=380, visual=1664), 256, 28, 128) == 4 * pairs * 28 * 128
    assert kernel_flops(Bucket(text=380, visual=1664), 256, 28, 128, 3) == 4 * (pairs + 384**2) * 28 * 128
    assert kernel_flops(Bucket(text=380, visual=0), 256, 28, 128) == 4 * 384**2 * 28 * 128


@pytest.mark.parametrize(
    ("length", "attention_range", "expected"),
    [(1, None, 128), (512, None, 512), (513, None, 384), (513, 256, 256), (513, 257, 384), (1664, 256, 256)],
)
def test_blocks_are_no_larger_than_the_run_needs(length, attention_range, expected):
    assert block_size(length, attention_range) == expected
