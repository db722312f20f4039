"""The check values are those of the method's description, to as many digits."""

import pytest

from rlens_jax.drops import DART, PyramidDrop, SparseVLM
from rlens_jax.errors import UserError
from rlens_jax.flops import (
    DecoderSizes,
    LayerSizes,
    branch_cost,
    layer_cost,
    mean_visual,
    prefill_cost,
    saving,
    selection_cost,
    visual_in_layer,
)
from rlens_jax.kept_tokens import CDPruner, DivPrune, Pooling, RandomTokens, StridedTokens
from rlens_jax.plans import FULL, SKIP, STANDARD, TEXT, Plan, Reduction
from rlens_jax.pruning import VTW, FastV, Folder

INTERNVL2_8B = LayerSizes(width=4096, query_width=4096, kv_width=1024, ffn_width=14336)  # 32 layers
QWEN2_VL_7B = LayerSizes(width=3584, query_width=3584, kv_width=512, ffn_width=18944)  # 28 layers
NUM_TEXT, NUM_VISUAL = 64, 1792


def last_layers(num_layers, count):
    layers = tuple(range(num_layers - count, num_layers))
    return Plan(layers, layers)


def percent_saved(sizes, visual_in_layer, plan, with_probes=False):
    share = saving(sizes, NUM_TEXT, visual_in_layer, plan, Reduction(), with_probes=with_probes)
    return round(100 * share, 1)


def test_a_layer_counted_by_hand():
    # D=2, N*H=4, K*H=1, F=10, T=3, P=20: R=4 leaves 20*4 of the 400 visual pairs, U=2, M=2.
    sizes = LayerSizes(width=2, query_width=4, kv_width=1, ffn_width=10)
    reduction = Reduction(attention_range=4)

    def cost(attention=FULL, ffn=FULL, with_probes=False):
        return layer_cost(sizes, 3, 20, reduction, attention=attention, ffn=ffn, with_probes=with_probes)

    projections = 23 * (2 * 2 * 4 + 2 * 2)
    dense = projections + 2 * 529 * 4 + 3 * 2 * 10 * 23
    assert cost() == dense
    assert cost(with_probes=True) == dense
    assert cost(STANDARD, with_probes=True) == cost(4) == dense - 2 * 4 * (400 - 80)
    assert cost(TEXT) == dense - 2 * 4 * 400
    assert cost(SKIP) == dense - 20 * 2 * 2 * 4 - 2 * 4 * 20 * 23
    assert cost(ffn=STANDARD) == cost(ffn=0.2) == dense - 3 * 2 * 8 * 20
    assert cost(ffn=STANDARD, with_probes=True) == dense - 3 * 2 * 8 * 20 + 2 * 2 * 10 * 2
    assert cost(ffn=0.5, with_probes=True) == dense - 3 * 2 * 5 * 20 + 2 * 2 * 10 * 2
    assert cost(ffn=SKIP, with_probes=True) == dense - 3 * 2 * 10 * 20
    assert cost(SKIP, SKIP) - cost(ffn=SKIP) == cost(SKIP) - dense


def test_a_branch_attends_to_the_trunk_and_itself():
    # A trunk of 23 tokens and branches of 4 and 5, which see 27 and 28 tokens.
    sizes = LayerSizes(width=2, query_width=4, kv_width=1, ffn_width=10)
    trunk = layer_cost(sizes, 3, 20, Reduction(), attention=FULL, ffn=FULL, with_probes=False)
    pairs = 23 * 23 + 4 * 27 + 5 * 28
    assert trunk + branch_cost(sizes, 23, 4) + branch_cost(sizes, 23, 5) == 32 * 2 * 2 * 5 + 2 * pairs * 4 + 3 * 2 * 10 * 32
    assert branch_cost(sizes, 23, 0) == 0


LLAVA_7B = LayerSizes(width=4096, query_width=4096, kv_width=4096, ffn_width=11008)
ONEVISION_05B = LayerSizes(width=896, query_width=896, kv_width=128, ffn_width=4864)
LEVELS = [(256, FULL), (TEXT, FULL), (SKIP, FULL), (FULL, 0.2), (FULL, SKIP), (SKIP, SKIP), (256, 0.2)]


@pytest.mark.parametrize(
    ("sizes", "num_visual", "percents"),
    [
        (LLAVA_7B, 576, [1.1, 2.0, 16.8, 46.9, 58.6, 75.5, 48.0]),
        (QWEN2_VL_7B, 1792, [4.3, 5.0, 15.3, 63.9, 79.8, 95.1, 68.2]),
        (INTERNVL2_8B, 1792, [5.2, 6.1, 20.2, 58.3, 72.9, 93.1, 63.5]),
        (ONEVISION_05B, 1792, [14.6, 17.0, 26.1, 55.4, 69.2, 95.3, 70.0]),
    ],
    ids=["LLaVA-1.5-7B", "Qwen2-VL-7B", "InternVL2-8B", "LLaVA-OneVision-0.5B"],
)
def test_saving_of_each_level(sizes, num_visual, percents):
    plans = [Plan.of({0: attention}, {0: ffn}) for attention, ffn in LEVELS]
    assert [percent_saved(sizes, [num_visual], plan) for plan in plans] == percents


OPSKIP_QWEN25_VL_7B = [  # preset: layers whose visual tokens skip the FFN, and those that skip attention; 20-25 and 27 are frozen
    ([], [26], 24.0),
    ([16], [17, 18, 19, 26], 28.3),
    ([11, 15, 16], [3, 4, 17, 18, 19, 26], 35.0),
    ([11, 15, 16], [1, 2, 3, 4, 5, 14, 17, 18, 19, 26], 37.0),
    ([6, 11, 15, 16], [1, 2, 3, 4, 5, 7, 9, 12, 14, 17, 18, 19, 26], 41.3),
    ([0, 6, 10, 11, 15, 16], [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 17, 18, 19, 26], 48.0),
]
"""Presets 8 to 28 of Op-Skip (arXiv 2606.31903) for Qwen2.5-VL-7B, whose layers have the sizes of Qwen2-VL-7B."""


@pytest.mark.parametrize(("without_ffn", "without_attention", "percent"), OPSKIP_QWEN25_VL_7B)
def test_saving_of_published_skip_plans(without_ffn, without_attention, percent):
    frozen = [20, 21, 22, 23, 24, 25, 27]
    plan = Plan.of(dict.fromkeys([*without_attention, *frozen], SKIP), dict.fromkeys([*without_ffn, *frozen], SKIP))
    assert percent_saved(QWEN2_VL_7B, [1296] * 28, plan) == pytest.approx(percent, abs=0.1)


def test_query_heads_may_be_wider_than_the_states():
    # Qwen3-VL-4B: D = 2560, but 32 query heads of 128.
    decoder = DecoderSizes(36, 2560, 32, 8, 128, 9728, qkv_bias=False, qk_norm=True)
    assert decoder.layer_sizes == LayerSizes(width=2560, query_width=4096, kv_width=1024, ffn_width=9728)
    saved = percent_saved(decoder.layer_sizes, [1024], Plan.of({0: SKIP}, {}))
    skipped = 2 * 1024 * (2560 * 4096 + 4096 * 1088)
    dense = 2 * 1088 * (2560 * (4096 + 1024) + 4096 * 1088) + 3 * 2560 * 9728 * 1088
    assert saved == round(100 * skipped / dense, 1)


@pytest.mark.parametrize(
    ("sizes", "plan", "percent"),
    [
        (INTERNVL2_8B, Plan((0,), (0,)), 63.5),
        (INTERNVL2_8B, Plan(ffn=(0,)), 58.3),
        (INTERNVL2_8B, Plan(attention=(0,)), 5.2),
        (QWEN2_VL_7B, Plan((0,), (0,)), 68.2),
    ],
)
def test_saving_of_one_layer(sizes, plan, percent):
    assert percent_saved(sizes, [NUM_VISUAL], plan) == percent


@pytest.mark.parametrize(
    ("sizes", "num_layers", "reduced", "percent", "percent_with_probes"),
    [(INTERNVL2_8B, 32, 14, 72.2, 74.3), (QWEN2_VL_7B, 28, 12, 70.8, 73.1)],
)
def test_the_published_savings_are_about_half_the_layers(sizes, num_layers, reduced, percent, percent_with_probes):
    visual, plan = [NUM_VISUAL] * num_layers, last_layers(num_layers, reduced)
    assert round(100 - percent_saved(sizes, visual, plan), 1) == percent
    assert round(100 - percent_saved(sizes, visual, plan, with_probes=True), 1) == percent_with_probes


@pytest.mark.parametrize(
    ("sizes", "num_layers", "dropped", "percent"),
    [(INTERNVL2_8B, 32, 0.3, 71.6), (QWEN2_VL_7B, 28, 0.3, 72.1), (INTERNVL2_8B, 32, 0.5, 53.2), (QWEN2_VL_7B, 28, 0.5, 53.9)],
)
def test_token_pruning_after_layer_two(sizes, num_layers, dropped, percent):
    visual = visual_in_layer(FastV(2, dropped), NUM_VISUAL, num_layers)
    assert round(100 - percent_saved(sizes, visual, Plan()), 1) == percent


def test_which_layers_see_how_many_visual_tokens():
    assert visual_in_layer(None, 10, 4) == [10] * 4
    assert visual_in_layer(FastV(1, 0.3), 10, 4) == [10, 7, 7, 7]
    assert visual_in_layer(VTW(3), 10, 4) == [10, 10, 10, 0]
    assert visual_in_layer(Folder(0.3), 10, 4) == [7] * 4
    with pytest.raises(UserError, match="after layer 4, but the model has 4 layers"):
        visual_in_layer(VTW(4), 10, 4)


def test_tokens_kept_and_mean_tokens():
    """FastV with 192, 128 or 64 of 576 kept after layer 2 of 32 has more tokens in a mean layer; chosen early they are equal."""
    assert [mean_visual([576] * 2 + [kept] * 30) for kept in (192, 128, 64)] == [216, 156, 96]
    assert [mean_visual([576] * 2 + [kept] * 30) for kept in (166, 98, 30)] == pytest.approx([192, 128, 64], abs=0.5)
    assert mean_visual(visual_in_layer(DivPrune(128), 576, 32)) == 128
    assert mean_visual(visual_in_layer(Pooling(192), 576, 32)) == 169


def test_what_choosing_tokens_costs():
    sizes, width, pairs = LayerSizes(8, 8, 4, 10), 8, 10 * 10
    assert [selection_cost(sizes, 4, 5, 10, one) for one in (None, VTW(2), RandomTokens(4), StridedTokens(4))] == [0] * 4
    assert selection_cost(sizes, 4, 5, 10, DivPrune(4)) == pairs * width + 4 * 10 * width
    assert selection_cost(sizes, 4, 5, 10, CDPruner(4)) == 5 * 10 * width + (1 + 2 + 3) * 10
    assert selection_cost(sizes, 4, 5, 18, Pooling(8, side=3)) == 8 * 18 * width
    # One row of attention, and its query.
    assert selection_cost(sizes, 4, 5, 10, FastV(2, 0.5)) == 8 * 8 + 15 * 8
    assert selection_cost(sizes, 4, 5, 10, FastV(2, 0.5, attention="all_tokens")) == 15 * (8 * 8 + 15 * 8)
    # 15, 10 and 7 tokens: a row of attention, its query, and all keys.
    assert selection_cost(sizes, 4, 5, 10, PyramidDrop()) == 8 * (23 + 18 + 15) + (15 + 10 + 7) * 8 * 4
    # Text against image once; 5 rows over 15, 11 and 9 tokens. Recycled: over 15, 12 and 10; 2, 1 and 1 with each other.
    assert selection_cost(sizes, 4, 5, 10, SparseVLM((6, 4, 2))) == 50 * 8 + 5 * 8 * (23 + 19 + 17)
    assert selection_cost(sizes, 4, 5, 10, SparseVLM((6, 4, 2), version="1.5")) == 50 * 8 + 40 * (23 + 20 + 18) + (4 + 1 + 1) * 8
    assert selection_cost(sizes, 4, 5, 10, DART(4)) == 8 * 10 * width  # eight pivots
    # 10 to 5 tokens in one round, to 2 in three: 5, 3, 2.
    assert [selection_cost(sizes, 4, 5, 10, Folder(share)) for share in (0.5, 0.8)] == [pairs * width, 3 * pairs * width]
    assert selection_cost(sizes, 4, 5, 0, DivPrune(4)) == 0


def test_tokens_merged_before_the_first_layer_are_saved_too():
    visual = visual_in_layer(Folder(0.5), NUM_VISUAL, 32)

    def share(**options):
        return saving(INTERNVL2_8B, NUM_TEXT, visual, Plan(), Reduction(), with_probes=False, **options)

    assert share() == 0
    assert share(num_visual=NUM_VISUAL) == pytest.approx(0.5, abs=0.02)


def test_without_visual_tokens_nothing_is_saved():
    plan = last_layers(4, 4)
    assert saving(INTERNVL2_8B, 100, [0] * 4, plan, Reduction(), with_probes=True) == 0


def test_a_range_as_long_as_the_image_saves_nothing():
    reduction = Reduction(attention_range=NUM_VISUAL)
    visual = [NUM_VISUAL] * 3
    assert saving(INTERNVL2_8B, 64, visual, Plan(attention=(1,)), reduction, with_probes=False) == 0


def test_prefill_is_the_sum_of_its_layers():
    visual, reduction = [1792, 1792, 900], Reduction()
    plan = Plan(attention=(1,), ffn=(2,))
    layers = [(1792, FULL, FULL), (1792, STANDARD, FULL), (900, FULL, STANDARD)]
    costs = [layer_cost(QWEN2_VL_7B, 64, p, reduction, attention=a, ffn=f, with_probes=True) for p, a, f in layers]
    assert prefill_cost(QWEN2_VL_7B, 64, visual, plan, reduction, with_probes=True) == sum(costs)


def test_a_plan_for_a_deeper_model_is_refused():
    with pytest.raises(UserError, match="3 layers"):
        prefill_cost(QWEN2_VL_7B, 64, [10] * 3, Plan(ffn=(3,)), Reduction(), with_probes=False)
