"""The check values are those of the method's description, to as many digits."""

import pytest

from rlens_jax.errors import UserError
from rlens_jax.flops import LayerSizes, branch_cost, layer_cost, prefill_cost, saving, visual_in_layer
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import VTW, FastV, Folder

INTERNVL2_8B = LayerSizes(width=4096, kv_width=1024, ffn_width=14336)  # 32 layers
QWEN2_VL_7B = LayerSizes(width=3584, kv_width=512, ffn_width=18944)  # 28 layers
NUM_TEXT, NUM_VISUAL = 64, 1792


def last_layers(num_layers, count):
    layers = tuple(range(num_layers - count, num_layers))
    return Plan(layers, layers)


def percent_saved(sizes, visual_in_layer, plan, with_probes=False):
    share = saving(sizes, NUM_TEXT, visual_in_layer, plan, Reduction(), with_probes=with_probes)
    return round(100 * share, 1)


def test_a_layer_counted_by_hand():
    # D=2, K*H=1, F=10, T=3, P=20: R=4 leaves 20*4 of the 400 visual pairs, U=2, M=2.
    sizes = LayerSizes(width=2, kv_width=1, ffn_width=10)
    reduction = Reduction(attention_range=4)

    def cost(**options):
        return layer_cost(sizes, 3, 20, reduction, **options)

    projections = 23 * (2 * 4 + 2 * 2)
    dense = projections + 2 * 529 * 2 + 3 * 2 * 10 * 23
    assert cost(hollow=False, dynamic=False, with_probes=False) == dense
    assert cost(hollow=False, dynamic=False, with_probes=True) == dense
    assert cost(hollow=True, dynamic=False, with_probes=True) == dense - 2 * 2 * (400 - 80)
    assert cost(hollow=False, dynamic=True, with_probes=False) == dense - 3 * 2 * 8 * 20
    assert cost(hollow=False, dynamic=True, with_probes=True) == dense - 3 * 2 * 8 * 20 + 2 * 2 * 10 * 2


def test_a_branch_attends_to_the_trunk_and_itself():
    # A trunk of 23 tokens and branches of 4 and 5, which see 27 and 28 tokens.
    sizes = LayerSizes(width=2, kv_width=1, ffn_width=10)
    trunk = layer_cost(sizes, 3, 20, Reduction(), hollow=False, dynamic=False, with_probes=False)
    pairs = 23 * 23 + 4 * 27 + 5 * 28
    assert trunk + branch_cost(sizes, 23, 4) + branch_cost(sizes, 23, 5) == 32 * 2 * 2 * 3 + 2 * pairs * 2 + 3 * 2 * 10 * 32
    assert branch_cost(sizes, 23, 0) == 0


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
    layers = [(1792, False, False), (1792, True, False), (900, False, True)]
    costs = [layer_cost(QWEN2_VL_7B, 64, p, reduction, hollow=h, dynamic=d, with_probes=True) for p, h, d in layers]
    assert prefill_cost(QWEN2_VL_7B, 64, visual, plan, reduction, with_probes=True) == sum(costs)


def test_a_plan_for_a_deeper_model_is_refused():
    with pytest.raises(UserError, match="3 layers"):
        prefill_cost(QWEN2_VL_7B, 64, [10] * 3, Plan(ffn=(3,)), Reduction(), with_probes=False)
