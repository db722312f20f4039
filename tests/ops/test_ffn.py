from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.ops.ffn import (
    FfnWeights,
    best_units,
    dense_ffn,
    dynamic_ffn,
    hidden_units,
    masked,
    probe_slots,
    simulated_dynamic_ffn,
    unit_scores,
)
from rlens_jax.ops.ffn_paths import RATES, Ways, Work, ways_on
from rlens_jax.plans import Reduction
from rlens_jax.sharding.mesh import FfnForm
from tests import torch_reductions
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length, unpack

pytestmark = pytest.mark.torch

WIDTH, UNITS = 12, 53
RAGGED = [run_length(3, 41, 5), run_length(2, 17, 4, 23, 1, 11, 6), run_length(7), run_length(1, 1, 1)]
KEY = jax.random.key(0)


def masked_ffn(x, weights, layout, reduction, random_key, chunk=None):
    return dynamic_ffn(x, replace(weights, ways=Ways(("masked",))), layout, reduction, random_key, chunk=chunk)


EVERY_WAY = pytest.mark.parametrize(
    "ffn",
    [dynamic_ffn, simulated_dynamic_ffn, masked_ffn, partial(masked_ffn, chunk=16)],
    ids=["gathered", "simulated", "masked", "chunks"],
)
MEASURED_AND_SIMULATED = pytest.mark.parametrize("ffn", [dynamic_ffn, simulated_dynamic_ffn])


def make_weights(seed: int, units: int = UNITS, width: int = WIDTH) -> FfnWeights:
    rng = np.random.default_rng(seed)
    return FfnWeights(*(jnp.asarray(rng.standard_normal((units, width)) / 3, jnp.float32) for _ in range(3)))


def run(ffn, rows, layout, weights, reduction, padding=np.zeros, key=KEY):
    """Outputs in sequence order, and the kept units of each sample."""
    compiled = jax.jit(lambda x, layout: ffn(x, weights, layout, reduction, key))
    y, kept = compiled(jnp.asarray(pack(rows, layout, padding)), layout)
    return unpack(y, layout), kept


def run_torch(rows, masks, weights, fraction="0.2", probe_fraction="0.1", probes=None):
    gate, up, down = (torch.tensor(np.asarray(w)) for w in (weights.gate, weights.up, weights.down))
    probes = probes or [None] * len(rows)
    return [
        torch_reductions.dynamic_ffn(torch.tensor(x), gate, up, down.T, torch.tensor(mask), fraction, probe_fraction, own)
        for x, mask, own in zip(rows, masks, probes, strict=True)
    ]


def assert_equals_torch(ours, kept, theirs):
    for i, (y, (expected, selection)) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(y, expected.numpy(), 1e-5)
        if selection is not None:
            assert selection.gap > 1e-4, "the example decides nothing: choose another seed"
            assert set(kept.units[i].tolist()) == set(selection.units.tolist())
    assert kept.scored.all()


@EVERY_WAY
@pytest.mark.parametrize("fraction", ["0.01", "0.2", "0.5", "1"])
def test_equals_torch_on_a_ragged_batch(ffn, fraction):
    rows, weights = random_rows(np.random.default_rng(0), RAGGED, WIDTH), make_weights(1)
    layout = make_layout(RAGGED, spare=(2, 3))
    ours, kept = run(ffn, rows, layout, weights, Reduction(active_fraction=fraction))
    assert_equals_torch(ours, kept, run_torch(rows, RAGGED, weights, fraction))


@MEASURED_AND_SIMULATED
@pytest.mark.parametrize("probe_fraction", ["0.1", "0.3", "0.7", "1"])
@pytest.mark.parametrize("num_visual", [0, 1, 9, 10, 11, 97])
def test_equals_torch_for_every_number_of_visual_tokens(ffn, num_visual, probe_fraction):
    masks, weights = [run_length(2, num_visual, 3)], make_weights(2)
    rows = random_rows(np.random.default_rng(num_visual), masks, WIDTH)
    ours, kept = run(ffn, rows, make_layout(masks), weights, Reduction(probe_fraction=probe_fraction))
    assert_equals_torch(ours, kept, run_torch(rows, masks, weights, probe_fraction=probe_fraction))


def test_measured_equals_simulated():
    rows, weights = random_rows(np.random.default_rng(3), RAGGED, WIDTH), make_weights(4)
    layout = make_layout(RAGGED)
    for probe in ("strided", "random"):
        reduction = Reduction(active_fraction=0.3, probe=probe)
        measured, kept = run(dynamic_ffn, rows, layout, weights, reduction)
        simulated, expected = run(simulated_dynamic_ffn, rows, layout, weights, reduction)
        for ours, theirs in zip(measured, simulated, strict=True):
            assert_close(ours, theirs, 1e-5)
        for row in np.flatnonzero(layout.num_visual):
            assert set(kept.units[row].tolist()) == set(expected.units[row].tolist())


@EVERY_WAY
def test_text_and_samples_without_images_use_every_unit(ffn):
    rows, weights = random_rows(np.random.default_rng(5), RAGGED, WIDTH), make_weights(6)
    layout = make_layout(RAGGED)
    ours, _ = run(ffn, rows, layout, weights, Reduction())
    for y, x, is_visual in zip(ours, rows, RAGGED, strict=True):
        dense = np.asarray(dense_ffn(jnp.asarray(x)[None], weights))[0]
        assert_close(y[~is_visual], dense[~is_visual], 1e-5)
        assert (np.abs(y - dense)[is_visual].max(axis=1, initial=0) > 1e-3).all()


@MEASURED_AND_SIMULATED
def test_all_units_is_the_dense_ffn(ffn):
    rows, weights = random_rows(np.random.default_rng(7), RAGGED, WIDTH), make_weights(8)
    ours, _ = run(ffn, rows, make_layout(RAGGED), weights, Reduction(active_fraction=1))
    for y, x in zip(ours, rows, strict=True):
        assert_close(y, np.asarray(dense_ffn(jnp.asarray(x)[None], weights))[0], 1e-5)


@EVERY_WAY
def test_a_bucket_without_visual_slots(ffn):
    masks, weights = [run_length(5), run_length(3)], make_weights(8)
    rows = random_rows(np.random.default_rng(8), masks, WIDTH)
    for probe in ("strided", "random"):
        ours, kept = run(ffn, rows, make_layout(masks), weights, Reduction(probe=probe))
        assert kept.scored.all()
        for y, x in zip(ours, rows, strict=True):
            assert_close(y, np.asarray(dense_ffn(jnp.asarray(x)[None], weights))[0], 1e-5)


@pytest.mark.parametrize(
    ("num_visual", "ordinals"),
    [(0, []), (1, [0]), (9, [0]), (10, [0]), (11, [0]), (20, [0, 10]), (29, [0, 14]), (35, [0, 11, 23])],
)
def test_strided_probes(num_visual, ordinals):
    for visual_slots in (40, 71):
        spare = (0, visual_slots - num_visual)
        slots, is_probe = probe_slots(make_layout([run_length(2, num_visual, 1)], spare), Reduction(), KEY)
        assert slots[0][is_probe[0]].tolist() == ordinals
    assert torch_reductions.probe_ordinals(num_visual, "0.1") == ordinals


def draw(masks, samples, key=KEY, spare=(0, 0), fraction=0.3):
    layout = make_layout(masks, spare, samples)
    slots, is_probe = probe_slots(layout, Reduction(probe="random", probe_fraction=fraction), key)
    return [slots[i][is_probe[i]].tolist() for i in range(len(masks))]


def test_random_probes_are_ordinals_of_the_sample_without_repetition():
    masks = [run_length(2, n, 1) for n in (0, 1, 9, 10, 11, 60)]
    seen = set()
    for seed in range(50):
        drawn = draw(masks, range(6), jax.random.key(seed))
        assert [len(ordinals) for ordinals in drawn] == [0, 1, 2, 3, 3, 18]
        for ordinals, mask in zip(drawn, masks, strict=True):
            assert len(set(ordinals)) == len(ordinals)
            assert all(0 <= ordinal < mask.sum() for ordinal in ordinals)
        seen.update(drawn[3])
    assert seen == set(range(10))


def test_random_probes_depend_on_key_and_sample_only():
    mask = run_length(2, 31, 1)
    (alone,) = draw([mask], [5])
    assert draw([run_length(3, 60), mask, run_length(4)], [1, 5, 2])[1] == alone
    assert draw([mask], [5], spare=(4, 9))[0] == alone
    assert draw([mask, mask], [5, 6])[1] != alone
    assert draw([mask], [5], jax.random.key(1))[0] != alone


@MEASURED_AND_SIMULATED
def test_random_probes_choose_what_torch_chooses_from_the_same_probes(ffn):
    rows, weights = random_rows(np.random.default_rng(9), RAGGED, WIDTH), make_weights(10)
    ours, kept = run(ffn, rows, make_layout(RAGGED), weights, Reduction(probe="random", probe_fraction=0.3))
    probes = draw(RAGGED, range(len(RAGGED)))
    assert_equals_torch(ours, kept, run_torch(rows, RAGGED, weights, probes=probes))


@MEASURED_AND_SIMULATED
def test_ties_go_to_the_lower_unit(ffn):
    weights = make_weights(11)
    twice = FfnWeights(*(jnp.concatenate([w, w]) for w in (weights.gate, weights.up, weights.down)))
    masks = [run_length(2, 23, 2)]
    rows = random_rows(np.random.default_rng(11), masks, WIDTH)
    for fraction in ("0.1", "0.2", "0.3"):
        ours, kept = run(ffn, rows, make_layout(masks), twice, Reduction(active_fraction=fraction))
        ((expected, selection),) = run_torch(rows, masks, twice, fraction)
        units = kept.units[0].tolist()
        assert units == selection.units.tolist()
        assert all(unit - UNITS in units for unit in units if unit >= UNITS)
        assert_close(ours[0], expected.numpy(), 1e-5)


def test_equal_scores_keep_the_first_units():
    kept = best_units(unit_scores(jnp.ones((1, 4, 30)), jnp.ones((1, 4), bool)), 7)
    assert kept.units.tolist() == [list(range(7))]


def test_scores_are_summed_in_float32():
    """In bfloat16 a sum of 256 + 1 + 1 + ... stays at 256."""
    ones = jnp.ones((1, 255, 1), jnp.bfloat16)
    growing = jnp.concatenate([jnp.full((1, 1, 1), 256, jnp.bfloat16), ones], axis=1)
    flat = jnp.full((1, 256, 1), 1.75, jnp.bfloat16)
    kept = best_units(unit_scores(jnp.concatenate([flat, growing], axis=2), jnp.ones((1, 256), bool)), 1)
    assert kept.units.tolist() == [[1]]


@EVERY_WAY
def test_a_score_that_is_no_number_is_marked(ffn):
    masks = [run_length(2, 30, 2)] * 4
    rows = random_rows(np.random.default_rng(12), masks, WIDTH)
    rows[1][2 + 10] = np.nan  # ordinal 10 is a probe
    rows[3][0] = np.nan  # a text token is none
    weights = make_weights(13)
    ours, kept = run(ffn, rows, make_layout(masks, spare=(1, 3)), weights, Reduction())
    assert kept.scored.tolist() == [True, False, True, True]
    ((expected, _),) = run_torch(rows[2:3], masks[2:3], weights)
    assert_close(ours[2], expected.numpy(), 1e-5)


@EVERY_WAY
@pytest.mark.parametrize("probe", ["strided", "random"])
def test_padding_never_leaks(ffn, probe):
    rows, weights = random_rows(np.random.default_rng(14), RAGGED, WIDTH), make_weights(15)
    layout, rng = make_layout(RAGGED, spare=(3, 25)), np.random.default_rng(16)
    reduction = Reduction(probe=probe)
    clean, kept = run(ffn, rows, layout, weights, reduction)
    for scale in (1e3, 1e15):

        def padding(shape, scale=scale):
            return scale * rng.standard_normal(shape)

        ours, chosen = run(ffn, rows, layout, weights, reduction, padding)
        assert chosen.scored.all()
        np.testing.assert_array_equal(chosen.units, kept.units)
        for y, expected in zip(ours, clean, strict=True):
            np.testing.assert_array_equal(y, expected)


@EVERY_WAY
def test_a_sample_does_not_depend_on_its_batch(ffn):
    rows, weights = random_rows(np.random.default_rng(17), RAGGED, WIDTH), make_weights(18)
    together, kept = run(ffn, rows, make_layout(RAGGED, spare=(1, 4)), weights, Reduction())
    for i, mask in enumerate(RAGGED):
        (alone,), chosen = run(ffn, [rows[i]], make_layout([mask]), weights, Reduction())
        assert_close(together[i], alone, 1e-5)
        assert kept.units[i].tolist() == chosen.units[0].tolist()


def test_samples_keep_different_units():
    rows, weights = random_rows(np.random.default_rng(19), RAGGED, WIDTH), make_weights(20)
    _, kept = run(dynamic_ffn, rows, make_layout(RAGGED), weights, Reduction())
    assert len({tuple(sorted(kept.units[i].tolist())) for i in (0, 1, 3)}) == 3


@pytest.mark.parametrize(
    ("device", "form", "most"),
    [
        (("gpu", "NVIDIA H100"), "rows", {1: 320, 2: 195, 8: 171}),
        (("tpu", "TPU v5 lite"), "halves", {1: 433, 2: 257, 8: 222}),
        (("tpu", "TPU v5 lite"), "rows", {1: 641, 2: 340, 8: 180}),
        (("tpu", "TPU v5p"), "halves", {1: 240, 2: 157, 8: 153}),
        (("tpu", "TPU v6 lite"), "halves", {1: 1290, 2: 880, 8: 661}),
    ],
)
def test_few_tokens_go_through_all_units(device: tuple[str, str], form: FfnForm, most: dict[int, int]) -> None:
    """As docs/ffn_paths.md has it: Qwen2-VL-7B's widths and 64 text tokens."""
    ways = ways_on(SimpleNamespace(platform=device[0], device_kind=device[1]), form, jnp.bfloat16, "auto")
    for shards, (batch, tokens) in product((1, 4), most.items()):
        units, kept = 18944 // shards, 3789 // shards
        taken = [ways.suited(Work(batch, 64, max(1, n // 10), n, units, kept)) for n in (1, tokens - 2, tokens + 4, 10**5)]
        assert taken == ["masked"] * 2 + ["kernel" if form == "halves" else "gathered"] * 2


def test_units_are_gathered_where_nothing_else_can_be_faster() -> None:
    cpu, gpu, old = (
        SimpleNamespace(platform=name, device_kind=kind) for name, kind in (("cpu", "cpu"), ("gpu", "A100"), ("tpu", "TPU v4"))
    )
    for device, dtype in ((cpu, jnp.bfloat16), (gpu, jnp.float32), (old, jnp.bfloat16)):
        assert ways_on(device, "rows", dtype, "auto").possible == ("gathered",)
    assert ways_on(gpu, "rows", jnp.float32, "masked").possible == ("masked",)


def test_the_suited_way_is_taken() -> None:
    """Hidden units of all tokens are formed by one way alone."""
    layout, ways = make_layout([run_length(7, 399, 4)]), Ways(("gathered", "masked"), RATES["gpu"])
    x, weights = jnp.zeros((1, layout.bucket.slots, WIDTH)), replace(make_weights(3), ways=ways)

    def masks(share: str) -> bool:
        reduction = Reduction(active_fraction=share)
        return "1x410x53" in jax.jit(lambda x: dynamic_ffn(x, weights, layout, reduction, KEY)).lower(x).as_text()

    assert masks("0.9") and not masks("0.02")


def test_a_shard_masks_the_units_that_lie_on_it() -> None:
    """Rows past the last unit, which other shards have, are none; each sample has its own."""
    hidden = jnp.ones((2, 3, 5))
    found = masked(hidden, jnp.asarray([[0, 3, 5, 5], [1, 2, 4, 5]]))
    np.testing.assert_array_equal(found, np.broadcast_to([[[1, 0, 0, 1, 0]], [[0, 1, 1, 0, 1]]], (2, 3, 5)))


def test_hidden_units_are_silu_of_gate_times_up():
    weights, x = make_weights(21), np.random.default_rng(21).standard_normal((1, 5, WIDTH)).astype(np.float32)
    gate, up = (torch.tensor(x) @ torch.tensor(np.asarray(w)).T for w in (weights.gate, weights.up))
    expected = torch.nn.functional.silu(gate) * up
    assert_close(hidden_units(jnp.asarray(x), weights), expected.numpy(), 1e-5)


def compiled_flops(ffn, layout, weights, *options) -> float:
    x = jnp.zeros((1, layout.bucket.slots, weights.gate.shape[1]))
    lowered = jax.jit(lambda x, weights, layout: ffn(x, weights, layout, *options)).lower(x, weights, layout)
    return lowered.compile().cost_analysis()["flops"]


def test_the_measured_path_computes_less():
    layout, weights = make_layout([run_length(7, 509, 4)]), make_weights(22, units=320, width=64)
    dense = compiled_flops(lambda x, weights, layout: dense_ffn(x, weights), layout, weights)
    simulated = compiled_flops(simulated_dynamic_ffn, layout, weights, Reduction(), KEY)
    costs = [
        compiled_flops(dynamic_ffn, layout, weights, Reduction(active_fraction=fraction), KEY) for fraction in (0.1, 0.2, 0.4)
    ]
    assert simulated >= dense
    # 0.07 for the probes and 0.02 for the text, and the share that is kept
    for cost, fraction in zip(costs, (0.1, 0.2, 0.4), strict=True):
        assert (fraction + 0.05) * dense < cost < (fraction + 0.15) * dense


def test_the_measured_path_forms_no_full_hidden_layer_for_visual_tokens():
    layout, weights = make_layout([run_length(7, 499, 4)]), make_weights(23, units=331)
    x = jnp.zeros((1, layout.bucket.slots, WIDTH))

    def text(ffn):
        return jax.jit(lambda x: ffn(x, weights, layout, Reduction(), KEY)).lower(x).as_text()

    assert "510x331" in text(simulated_dynamic_ffn)
    assert "499x331" not in text(dynamic_ffn)
    assert "510x331" not in text(dynamic_ffn)
    assert "499x66x" in text(dynamic_ffn)
