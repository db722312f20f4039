"""The contract of every attention path, and what the packed path saves. A path is checked against the reference and PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from rlens_jax.layout import PADDING_POSITION, visible
from rlens_jax.ops.attention import (
    attend,
    attend_text,
    chunked_attention,
    chunked_text_attention,
    packed_attention,
    packed_text_attention,
    reference_attention,
)
from rlens_jax.ops.attention_tpu import splash_attention, splash_text_attention
from rlens_jax.plans import TEXT
from tests import torch_reductions
from tests.numerics import assert_close
from tests.sequences import branch_tokens, fork, forked_layout, make_layout, pack, random_rows, run_length, unpack
from tests.torch_reductions import hollow_mask

pytestmark = pytest.mark.torch

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
RAGGED = [run_length(3, 41, 5), run_length(2, 17, 4, 23, 1, 11, 6), run_length(7), run_length(1, 1, 1)]
"""One image; three images with text between, of odd lengths; no image; one visual token."""
UNEVEN = [run_length(3, 31, 5), run_length(2, 7, 140, 11, 6), run_length(7), run_length(1, 1, 1)]
"""The same, with more text between two images than a block has."""
LONG = [run_length(3, 271, 5), run_length(2, 101, 4, 61, 1, 131, 37), run_length(7), run_length(1, 1, 1)]
"""The same, in several of the kernel's blocks, which have 128 slots or more."""
BRANCHES = [(4, 1, 131, 7, 9), (6, 2), (3,), (2, 5)]
"""Text tokens of the branches of each sample."""
ABUNDANT = 1000
SPARE = (2, 3)
"""Text and visual slots that the longest sample leaves empty. The same in many tests, which so share their programs."""


@dataclass(frozen=True)
class Path:
    """An implementation and the inputs on which it is checked."""

    attention: Callable[..., jax.Array]
    """(q, k, v, layout, attention_range, window[, block])."""
    masks: list[np.ndarray]
    cases: tuple[tuple[int | None, str, int | None], ...]
    """Ranges, windows and blocks for the equality with the reference."""
    attention_range: int
    """A range narrower than the images, for the other tests."""
    block: int | None
    small: tuple[np.ndarray, int | None] = (run_length(2, 7, 2, 6, 3), 4)
    """A sample whose visual tokens fill several blocks of the smallest size, and this size."""
    rounding: float = 0.0
    """Difference between results that are the same up to the order of sums."""
    tolerance: float = 1e-5
    bfloat16: float = 2**-7

    def options(self, attention_range: int | None, window: str = "ordinal", block: int | None = None) -> tuple[Any, ...]:
        """Arguments after the layout."""
        block = block or self.block
        return (attention_range, window) if block is None else (attention_range, window, block)


PACKED_CASES = (
    *((r, "ordinal", 7) for r in (None, 1, 2, 8, 9, 50, 51)),
    *((r, "ordinal", ABUNDANT) for r in (None, 11, ABUNDANT)),
    *((r, "position", 13) for r in (2, 11, 51)),
    (3, "ordinal", 1),
)
PATHS = {
    "reference": Path(
        reference_attention,
        RAGGED,
        tuple((r, window, None) for r, window, _ in PACKED_CASES),
        11,
        None,
        small=(run_length(2, 7, 2, 6, 3), None),
    ),
    "packed": Path(packed_attention, RAGGED, PACKED_CASES, 11, 13),
    "chunked": Path(
        chunked_attention,
        UNEVEN,
        ((None, "ordinal", 7), (3, "ordinal", 128), (3, "position", 7), (100, "ordinal", 7)),
        3,
        7,
        rounding=1e-6,
        tolerance=1e-6,
    ),
    "splash": Path(
        partial(splash_attention, interpret=True),
        LONG,
        (
            (None, "ordinal", 128),
            (1, "ordinal", 128),
            (131, "ordinal", 128),
            (131, "position", 128),
            (31, "ordinal", 512),
            (1009, "ordinal", 512),
        ),
        131,
        128,
        small=(run_length(2, 131, 3, 67, 1), 128),
        bfloat16=2e-2,
    ),
    "cudnn": Path(  # its pieces in plain XLA
        partial(attend, kernel="cudnn"),
        RAGGED,
        (*((r, "ordinal", None) for r in (None, 1, 2, 11, 50, 51, ABUNDANT)), (11, "position", None)),
        11,
        None,
        small=(run_length(2, 7, 2, 6, 3), None),
        rounding=1e-6,
    ),
}
DIFFERENTIABLE = [name for name in PATHS if name not in ("splash", "cudnn")]
MARKS = {"splash": [pytest.mark.slow]}  # a kernel for TPUs, interpreted on CPU


def qkv_rows(seed: int, masks):
    rng = np.random.default_rng(seed)
    return [random_rows(rng, masks, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def packed_qkv(rows, layout, padding=np.zeros):
    return [jnp.asarray(pack(r, layout, padding).swapaxes(1, 2)) for r in rows]


@cache
def compiled(attention, *options):
    """One program for all tests with these options and shapes."""
    return jax.jit(lambda q, k, v, layout: attention(q, k, v, layout, *options))


def run(attention, rows, layout, *options, padding=np.zeros):
    """[T_i, N, H] of each sample, in sequence order."""
    y = compiled(attention, *options)(*packed_qkv(rows, layout, padding), layout)
    assert np.isfinite(y).all()
    return unpack(y.swapaxes(1, 2), layout)


def torch_attention(rows, masks, attention_range, window="ordinal"):
    outputs = []
    for *sample, is_visual in zip(*rows, masks, strict=True):
        q, k, v = (torch.tensor(x).transpose(0, 1) for x in sample)
        mask = hollow_mask(torch.tensor(is_visual), attention_range, window)
        outputs.append(torch_reductions.attention(q, k, v, mask).transpose(0, 1).numpy())
    return outputs


def attended_text(query, keys, values):
    """[N, H] of one query [N, H] and the tokens [S, K, H] that it sees, in float64; zeros without any."""
    output = np.zeros(query.shape)
    for head in range(len(query) if len(keys) else 0):
        kv = head * KV_HEADS // HEADS
        weights = np.exp(keys[:, kv].astype(np.float64) @ query[head] / np.sqrt(HEAD_DIM))
        output[head] = weights @ values[:, kv] / weights.sum()
    return output


TEXT_ROWS = {
    "packed": packed_text_attention,
    "chunked": chunked_text_attention,
    "splash": partial(splash_text_attention, interpret=True),
    "cudnn": partial(attend_text, kernel="cudnn"),
}
"""The paths that compute the rows of text slots alone."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in TEXT_ROWS])
@pytest.mark.parametrize("branched", [False, True])
def test_text_rows_alone_are_those_of_dense_attention(name, branched):
    masks = [run_length(2, 17, 4, 131, 6), run_length(7), run_length(0, 5, 1)]
    trunks = [fork(mask, lengths) for mask, lengths in zip(masks, [(4, 130), (3,), (2, 5)], strict=True)]
    layout = forked_layout(trunks, (2, 3)) if branched else make_layout(masks, spare=(2, 3))
    rows = qkv_rows(8, [token.is_visual for token in trunks] if branched else masks)
    q, k, v = packed_qkv(rows, layout)
    text = slice(layout.bucket.text)
    alone = jax.jit(TEXT_ROWS[name])(q[:, :, text], k, v, layout)
    whole = compiled(reference_attention, None, "ordinal")(q, k, v, layout)
    used = np.arange(layout.bucket.text) < np.asarray(layout.num_text)[:, None]
    assert_close(alone.swapaxes(1, 2)[used], whole[:, :, text].swapaxes(1, 2)[used], 1e-5)


@pytest.mark.parametrize("attention", [packed_attention, chunked_attention], ids=["packed", "chunked"])
def test_attention_to_text_where_no_row_has_text_before_images(attention):
    layout = forked_layout([fork(run_length(0, 9), (3, 2))])
    assert layout.leading_text == 0
    q, k, v = packed_qkv(qkv_rows(9, [fork(run_length(0, 9), (3, 2)).is_visual]), layout)
    attended = jax.jit(attention, static_argnums=4)(q, k, v, layout, TEXT)
    assert not attended[:, :, layout.bucket.text :].any()
    assert attended[:, :, : layout.bucket.text].all()


@pytest.fixture(params=[pytest.param(path, id=name, marks=MARKS.get(name, [])) for name, path in PATHS.items()])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


class TestAttentionContract:
    """What holds for every path. Where a test has no cases of its own, dense and Hollow Attention are both checked."""

    @pytest.mark.parametrize(
        ("path", "case"),
        [
            pytest.param(path, case, id=f"{name}-{case}", marks=MARKS.get(name, []))
            for name, path in PATHS.items()
            for case in path.cases
        ],
    )
    def test_equals_reference_and_torch_on_a_ragged_batch(self, path: Path, case):
        attention_range, window, _ = case
        rows, layout = qkv_rows(0, path.masks), make_layout(path.masks, spare=SPARE)
        ours = run(path.attention, rows, layout, *path.options(*case))
        reference = run(reference_attention, rows, layout, attention_range, window)
        expected = torch_attention(rows, path.masks, attention_range, window)
        for mine, simulated, theirs in zip(ours, reference, expected, strict=True):
            assert_close(mine, simulated, path.tolerance)
            assert_close(mine, theirs, 1e-5)

    @pytest.mark.parametrize(
        ("num_visual", "attention_range"), [(0, 1), (1, 1), (9, 10), (10, 10), (11, 10), (10, 11), (31, 11), (31, 1)]
    )
    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_equals_torch_for_every_number_of_visual_tokens(self, name, num_visual, attention_range):
        """Around the range and the block."""
        masks = [run_length(2, num_visual, 3)]
        rows, layout = qkv_rows(num_visual, masks), make_layout(masks)
        block = () if name == "reference" else (5,)
        (ours,) = run(PATHS[name].attention, rows, layout, attention_range, "ordinal", *block)
        (theirs,) = torch_attention(rows, masks, attention_range)
        assert_close(ours, theirs, 1e-5)

    def test_a_bucket_without_visual_slots_is_causal_attention(self, path: Path):
        masks = [run_length(5), run_length(131)]
        rows, layout = qkv_rows(5, masks), make_layout(masks, spare=(1, 0))
        assert layout.bucket.visual == 0
        expected = run(reference_attention, rows, layout, None, "ordinal")
        for ours, causal in zip(run(path.attention, rows, layout, *path.options(7)), expected, strict=True):
            assert_close(ours, causal, 1e-5)

    def test_a_range_of_all_visual_tokens_is_dense_attention(self, path: Path):
        rows, layout = qkv_rows(1, path.masks), make_layout(path.masks, spare=SPARE)
        counts = [int(mask.sum()) for mask in path.masks]

        def outputs(attention_range):
            return run(path.attention, rows, layout, *path.options(attention_range))

        dense = outputs(None)
        for ours, expected in zip(outputs(max(counts)), dense, strict=True):
            assert_close(ours, expected, path.rounding)
        # With one less, the last visual token of the longest sample no longer sees the first.
        for count, ours, expected in zip(counts, outputs(max(counts) - 1), dense, strict=True):
            changed = np.abs(ours - expected).max(axis=(1, 2)) > 10 * path.rounding
            assert changed.sum() == (count == max(counts))

    def test_attention_to_text_only(self, path: Path):
        """Visual tokens see the text before them, and get zeros if there is none; text sees all tokens before it."""
        masks = [*path.masks, run_length(0, 9, 4, 7, 2)]
        rows, layout = qkv_rows(6, masks), make_layout(masks, spare=(2, 3))
        ours = run(path.attention, rows, layout, *path.options(TEXT))
        dense = torch_attention(rows, masks, None)
        for (q, k, v), mine, plain, is_visual in zip(zip(*rows, strict=True), ours, dense, masks, strict=True):
            assert_close(mine[~is_visual], plain[~is_visual], 1e-5)
            for i in np.flatnonzero(is_visual):
                assert_close(mine[i], attended_text(q[i], k[:i][~is_visual[:i]], v[:i][~is_visual[:i]]), 1e-5)
        assert not ours[-1][:9].any()

    def test_weights_are_positive_exactly_where_the_mask_says(self, path: Path):
        """With the identity for values, the output is the matrix of attention weights."""
        is_visual, block = path.small
        layout = make_layout([is_visual], spare=(1, 2))
        slots = layout.bucket.slots
        rng = np.random.default_rng(2)
        q, k = (jnp.asarray(rng.standard_normal((1, heads, slots, slots)), jnp.float32) for heads in (HEADS, KV_HEADS))
        identity = jnp.broadcast_to(jnp.eye(slots), (1, KV_HEADS, slots, slots))
        weights = np.asarray(compiled(path.attention, *path.options(3, block=block))(q, k, identity, layout))[0]
        for head in weights:
            np.testing.assert_array_equal(in_sequence(head, layout) > 0, hollow_mask(torch.tensor(is_visual), 3))
            assert_close(in_sequence(head, layout).sum(axis=1), np.ones(len(is_visual)), 1e-5)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_the_mask_is_the_support_of_the_jacobian(self, name):
        """Influence of every token on every output: exactly 0 outside the window, not 0 inside; text sees every image."""
        path = PATHS[name]
        is_visual, block = path.small
        (x,) = random_rows(np.random.default_rng(2), [is_visual], KV_HEADS, HEAD_DIM)
        layout = make_layout([is_visual], spare=(1, 2))
        projection = jnp.asarray(np.random.default_rng(3).standard_normal((KV_HEADS, HEAD_DIM)), jnp.float32)
        options = path.options(3, block=block)

        def output(x):
            return jnp.einsum("KTH,KH->T", path.attention(x, x, x, layout, *options)[0], projection)

        packed = jnp.asarray(pack([x], layout).swapaxes(1, 2))
        influence = in_sequence(np.abs(jax.jit(jax.jacrev(output))(packed)[:, 0]).max(axis=(1, 3)), layout)
        np.testing.assert_array_equal(influence != 0, hollow_mask(torch.tensor(is_visual), 3).numpy())
        assert (influence[-1][is_visual] > 0).all()

    @pytest.mark.parametrize("hollow", [False, True], ids=["dense", "hollow"])
    def test_padding_never_leaks(self, path: Path, hollow):
        rows, layout = qkv_rows(4, path.masks), make_layout(path.masks, spare=SPARE)
        rng = np.random.default_rng(5)
        options = path.options(path.attention_range if hollow else None)
        clean = run(path.attention, rows, layout, *options)
        for scale in (1e3, 1e15):

            def garbage(shape, scale=scale):
                return scale * rng.standard_normal(shape)

            dirty = unpack(compiled(path.attention, *options)(*packed_qkv(rows, layout, garbage), layout).swapaxes(1, 2), layout)
            for ours, expected in zip(dirty, clean, strict=True):
                np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("window", [None, "ordinal", "position"], ids=["dense", "ordinal", "position"])
    def test_a_branch_has_the_outputs_of_its_prompt_alone(self, path: Path, window):
        """With nonsense in all empty slots; the last trunk has text for several blocks of the kernel."""
        attention_range = path.attention_range if window else None
        trunks = [*path.masks[:3], run_length(149, 3, 1)]
        forked = [fork(trunk, lengths) for trunk, lengths in zip(trunks, BRANCHES, strict=True)]
        layout, rows = forked_layout(forked, spare=(2, 3)), qkv_rows(8, [row.is_visual for row in forked])
        rng = np.random.default_rng(9)
        options = path.options(attention_range, window or "ordinal")
        together = run(path.attention, rows, layout, *options, padding=lambda shape: 1e3 * rng.standard_normal(shape))
        for sample, (ours, row, lengths) in enumerate(zip(together, forked, BRANCHES, strict=True)):
            for tokens in branch_tokens(row, len(lengths)):
                alone = [[part[sample][tokens]] for part in rows]
                (expected,) = torch_attention(alone, [row.is_visual[tokens]], attention_range, window or "ordinal")
                assert_close(ours[tokens], expected, 1e-5)

    @pytest.mark.parametrize("hollow", [False, True], ids=["dense", "hollow"])
    def test_a_sample_does_not_depend_on_its_batch(self, path: Path, hollow):
        rows = qkv_rows(6, path.masks)
        options = path.options(path.attention_range if hollow else None)
        together = run(path.attention, rows, make_layout(path.masks, spare=SPARE), *options)
        bucket = make_layout(path.masks).bucket  # one for all, so one program
        for i, mask in enumerate(path.masks):
            own = make_layout([mask]).bucket
            layout = make_layout([mask], spare=(bucket.text - own.text, bucket.visual - own.visual))
            (alone,) = run(path.attention, [[r[i]] for r in rows], layout, *options)
            assert_close(together[i], alone, 1e-5)

    @pytest.mark.parametrize("hollow", [False, True], ids=["dense", "hollow"])
    def test_positions_may_have_gaps_as_pruning_leaves_them(self, path: Path, hollow):
        """Every third position is gone."""
        attention_range = path.attention_range if hollow else None
        layout = make_layout(path.masks, spare=SPARE)
        q, k, v = packed_qkv(qkv_rows(5, path.masks), layout)

        def thinned(position):
            return np.where(position < PADDING_POSITION, position + position // 2, position)

        gaps = replace(layout, text_position=thinned(layout.text_position), visual_position=thinned(layout.visual_position))
        ours = compiled(path.attention, *path.options(attention_range))(q, k, v, gaps)
        expected = compiled(reference_attention, attention_range, "ordinal")(q, k, v, gaps)
        for mine, theirs in zip(*(unpack(x.swapaxes(1, 2), layout) for x in (ours, expected)), strict=True):
            assert_close(mine, theirs, 1e-5)

    @pytest.mark.parametrize("hollow", [False, True], ids=["dense", "hollow"])
    def test_bfloat16_stays_bfloat16_and_sums_in_float32(self, path: Path, hollow):
        attention_range = path.attention_range if hollow else None
        masks = [*path.masks, run_length(3, 301, 4)]
        layout = make_layout(masks, spare=(2, 3))
        rows = [[r.astype(jnp.bfloat16).astype(np.float32) for r in rs] for rs in qkv_rows(7, masks)]
        q, k, v = (x.astype(jnp.bfloat16) for x in packed_qkv(rows, layout))
        y = compiled(path.attention, *path.options(attention_range))(q, k, v, layout)
        assert y.dtype == jnp.bfloat16
        ours = unpack(y.astype(jnp.float32).swapaxes(1, 2), layout)
        for mine, theirs in zip(ours, torch_attention(rows, masks, attention_range), strict=True):
            assert_close(mine, theirs, path.bfloat16)


def in_sequence(matrix, layout):
    """A packed [T, T] matrix of one sample with rows and columns in sequence order."""
    (rows,) = unpack(matrix[None], layout)
    (columns,) = unpack(rows.T[None], layout)
    return columns.T


def test_the_mask_of_the_layout_is_that_of_torch():
    is_visual = run_length(2, 7, 2, 6, 3)
    layout = make_layout([is_visual], spare=(1, 2))
    mask = np.asarray(visible(layout.slots, layout.slots, 3))[0]
    np.testing.assert_array_equal(in_sequence(mask, layout), hollow_mask(torch.tensor(is_visual), 3))


def zeros(layout) -> list[jax.Array]:
    return [jnp.zeros((1, heads, layout.bucket.slots, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def compiled_flops(attention, layout, *options) -> float:
    return compiled(attention, *options).lower(*zeros(layout), layout).compile().cost_analysis()["flops"]


def test_the_packed_path_computes_less():
    layout = make_layout([run_length(11, 1021, 6)])
    simulated = compiled_flops(reference_attention, layout, 64)
    dense = compiled_flops(packed_attention, layout, None, "ordinal", 64)
    hollow = compiled_flops(packed_attention, layout, 64, "ordinal", 64)
    wider = compiled_flops(packed_attention, layout, 256, "ordinal", 64)
    assert hollow < 0.35 * dense < 0.35 * simulated
    assert hollow < wider < dense


def formed_shapes(attention, layout, *options) -> set[tuple[int, ...]]:
    """Shapes of all values that the computation forms."""
    jaxpr = jax.make_jaxpr(lambda *arrays: attention(*arrays, *options))(*zeros(layout), layout)
    shapes = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(variable.aval.shape for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jaxpr.jaxpr)
    return shapes


@pytest.mark.parametrize("name", ["packed", "chunked"])
def test_no_square_of_the_visual_tokens_is_formed(name):
    num_visual = 499
    layout = make_layout([run_length(5, num_visual, 6)])

    def squares(shapes):
        return [shape for shape in shapes if sum(size >= num_visual for size in shape) > 1]

    assert squares(formed_shapes(reference_attention, layout, 31))
    assert not squares(formed_shapes(PATHS[name].attention, layout, 31, "ordinal", 64))
