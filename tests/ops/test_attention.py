import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from rlens_jax.ops.attention import packed_attention, reference_attention
from tests import torch_reductions
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length, unpack
from tests.torch_reductions import hollow_mask

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
RAGGED = [run_length(3, 41, 5), run_length(2, 17, 4, 23, 1, 11, 6), run_length(7), run_length(1, 1, 1)]
ABUNDANT = 1000


def qkv_rows(seed: int, masks):
    rng = np.random.default_rng(seed)
    return [random_rows(rng, masks, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def packed_qkv(rows, layout, padding=np.zeros):
    return [jnp.asarray(pack(r, layout, padding).swapaxes(1, 2)) for r in rows]


def run(attention, rows, layout, *options, padding=np.zeros):
    """[T_i, N, H] of each sample, in sequence order."""
    compiled = jax.jit(lambda q, k, v, layout: attention(q, k, v, layout, *options))
    return unpack(compiled(*packed_qkv(rows, layout, padding), layout).swapaxes(1, 2), layout)


def torch_attention(rows, masks, attention_range, window="ordinal"):
    outputs = []
    for *sample, is_visual in zip(*rows, masks, strict=True):
        q, k, v = (torch.tensor(x).transpose(0, 1) for x in sample)
        mask = hollow_mask(torch.tensor(is_visual), attention_range, window)
        outputs.append(torch_reductions.attention(q, k, v, mask).transpose(0, 1).numpy())
    return outputs


@pytest.mark.parametrize(
    ("attention_range", "window", "block"),
    [
        *((r, "ordinal", 7) for r in (None, 1, 2, 8, 9, 50, 51)),
        *((r, "ordinal", ABUNDANT) for r in (None, 11, ABUNDANT)),
        *((r, "position", 13) for r in (2, 11, 51)),
        (3, "ordinal", 1),
    ],
)
def test_measured_equals_reference_and_torch_on_a_ragged_batch(attention_range, block, window):
    rows, layout = qkv_rows(0, RAGGED), make_layout(RAGGED, spare=(2, 3))
    measured = run(packed_attention, rows, layout, attention_range, window, block)
    reference = run(reference_attention, rows, layout, attention_range, window)
    expected = torch_attention(rows, RAGGED, attention_range, window)
    for ours, simulated, theirs in zip(measured, reference, expected, strict=True):
        assert_close(ours, simulated, 1e-5)
        assert_close(ours, theirs, 1e-5)
        assert_close(simulated, theirs, 1e-5)


@pytest.mark.parametrize("num_visual", [0, 1, 9, 10, 11, 31])
def test_measured_equals_torch_for_every_number_of_visual_tokens(num_visual):
    masks = [run_length(2, num_visual, 3)]
    rows, layout = qkv_rows(num_visual, masks), make_layout(masks)
    for attention_range in (1, 10, 11):
        (ours,) = run(packed_attention, rows, layout, attention_range, "ordinal", 5)
        (theirs,) = torch_attention(rows, masks, attention_range)
        assert_close(ours, theirs, 1e-5)


def test_a_range_of_all_visual_tokens_is_dense_attention():
    rows, layout = qkv_rows(1, RAGGED), make_layout(RAGGED)
    most = max(int(mask.sum()) for mask in RAGGED)
    dense = run(packed_attention, rows, layout, None, "ordinal", 13)
    for ours, expected in zip(run(packed_attention, rows, layout, most, "ordinal", 13), dense, strict=True):
        np.testing.assert_array_equal(ours, expected)
    for ours, expected in zip(run(packed_attention, rows, layout, most - 1, "ordinal", 13), dense, strict=True):
        changed = np.abs(ours - expected).max(axis=(1, 2)) > 0
        assert changed.sum() == (len(expected) == len(RAGGED[1]))


@pytest.mark.parametrize("attention", [packed_attention, reference_attention])
def test_influence_is_exactly_what_the_mask_says(attention):
    """Of every token on every output: exactly 0 outside the window, not 0 inside; text sees every image."""
    is_visual = run_length(2, 7, 2, 6, 3)
    (x,) = random_rows(np.random.default_rng(2), [is_visual], KV_HEADS, HEAD_DIM)
    layout = make_layout([is_visual], spare=(1, 2))
    weights = jnp.asarray(np.random.default_rng(3).standard_normal((KV_HEADS, HEAD_DIM)), jnp.float32)
    options = (3, "ordinal", 4) if attention is packed_attention else (3,)

    def output(x):
        y = attention(x, x, x, layout, *options)[0]
        return jnp.einsum("KTH,KH->T", y, weights)

    packed = jnp.asarray(pack([x], layout).swapaxes(1, 2))
    influence = np.abs(jax.jacrev(output)(packed)[:, 0]).max(axis=(1, 3))
    (rows,) = unpack(influence[None], layout)
    (columns,) = unpack(rows.T[None], layout)
    influence = columns.T
    expected = hollow_mask(torch.tensor(is_visual), 3).numpy()
    np.testing.assert_array_equal(influence != 0, expected)
    last_text = influence[-1]
    assert (last_text[is_visual] > 0).all()


@pytest.mark.parametrize("attention_range", [None, 11])
def test_padding_never_leaks(attention_range):
    rows, layout = qkv_rows(4, RAGGED), make_layout(RAGGED, spare=(3, 5))
    rng = np.random.default_rng(5)
    clean = run(packed_attention, rows, layout, attention_range, "ordinal", 13)
    for scale in (1e3, 1e15):
        garbage = run(
            packed_attention,
            rows,
            layout,
            attention_range,
            "ordinal",
            13,
            padding=lambda shape, scale=scale: scale * rng.standard_normal(shape),
        )
        for ours, expected in zip(garbage, clean, strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("attention_range", [None, 11])
def test_a_sample_does_not_depend_on_its_batch(attention_range):
    rows = qkv_rows(6, RAGGED)
    together = run(packed_attention, rows, make_layout(RAGGED, spare=(1, 4)), attention_range, "ordinal", 13)
    for i, mask in enumerate(RAGGED):
        own = [[r[i]] for r in rows]
        (alone,) = run(packed_attention, own, make_layout([mask]), attention_range, "ordinal", 13)
        assert_close(together[i], alone, 1e-5)


def test_bfloat16_stays_bfloat16_and_sums_in_float32():
    masks = [run_length(3, 301, 4)]
    rows, layout = qkv_rows(7, masks), make_layout(masks)
    rows = [[r.astype(jnp.bfloat16).astype(np.float32) for r in rs] for rs in rows]
    q, k, v = (x.astype(jnp.bfloat16) for x in packed_qkv(rows, layout))
    packed = packed_attention(q, k, v, layout, 64)
    assert packed.dtype == jnp.bfloat16
    (ours,) = unpack(packed.astype(jnp.float32).swapaxes(1, 2), layout)
    assert_close(ours, torch_attention(rows, masks, 64)[0], 2**-7)


def compiled_flops(attention, layout, *options) -> float:
    slots = layout.bucket.slots
    q, k, v = (jnp.zeros((1, heads, slots, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    lowered = jax.jit(lambda q, k, v, layout: attention(q, k, v, layout, *options)).lower(q, k, v, layout)
    return lowered.compile().cost_analysis()["flops"]


def test_the_measured_path_computes_less():
    layout = make_layout([run_length(11, 1021, 6)])
    simulated = compiled_flops(reference_attention, layout, 64)
    dense = compiled_flops(packed_attention, layout, None, "ordinal", 64)
    hollow = compiled_flops(packed_attention, layout, 64, "ordinal", 64)
    wider = compiled_flops(packed_attention, layout, 256, "ordinal", 64)
    assert hollow < 0.35 * dense < 0.35 * simulated
    assert hollow < wider < dense


def axis_products(attention, layout, *options) -> set[tuple[int, ...]]:
    """Shapes of all values that the computation forms."""
    slots = layout.bucket.slots
    q, k, v = (jnp.zeros((1, heads, slots, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    jaxpr = jax.make_jaxpr(lambda q, k, v, layout: attention(q, k, v, layout, *options))(q, k, v, layout)
    shapes = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(variable.aval.shape for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jaxpr.jaxpr)
    return shapes


def test_the_measured_path_forms_no_square_of_the_visual_tokens():
    num_visual = 499
    layout = make_layout([run_length(5, num_visual, 6)])

    def squares(shapes):
        return [shape for shape in shapes if sum(size >= num_visual for size in shape) > 1]

    assert squares(axis_products(reference_attention, layout, 31))
    assert not squares(axis_products(packed_attention, layout, 31, "ordinal", 64))
