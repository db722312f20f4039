from fractions import Fraction

import numpy as np
import pytest

from rlens_jax.errors import UserError
from rlens_jax.plans import FULL, SKIP, STANDARD, STANDARD_LEVELS, TEXT, Levels, Plan, Reduction, chain

LEVELLED = Plan((1,), (), ((2, 64), (3, TEXT), (4, SKIP), (5, SKIP)), ((2, 0.5), (4, SKIP), (5, SKIP)))


def test_a_fraction_is_the_decimal_that_was_written():
    # In binary floating point 0.29 * 100 is 28.999999999999996; as a decimal it is 29.
    assert int(0.29 * 100) == 28
    assert Reduction(probe_fraction=0.29).probe_count(100) == 29
    assert Reduction(probe_fraction="0.29").probe_count(100) == 29
    assert Reduction(probe_fraction="0.10") == Reduction(probe_fraction=0.1)
    assert len({Reduction(active_fraction="0.2"), Reduction(active_fraction=0.2), Reduction()}) == 1


@pytest.mark.parametrize(("num_visual", "count"), [(0, 0), (1, 1), (9, 1), (19, 1), (20, 2), (1792, 179)])
def test_probe_count_default(num_visual, count):
    assert Reduction().probe_count(num_visual) == count


def test_probe_count_never_exceeds_the_tokens():
    assert Reduction(probe_fraction=1).probe_count(7) == 7


@pytest.mark.parametrize("fraction", [0.1, 0.37, "0.999", 1])
def test_probe_capacity_suffices_for_every_smaller_sample(fraction):
    reduction = Reduction(probe_fraction=fraction)
    counts = [reduction.probe_count(p) for p in range(65)]
    assert reduction.probe_capacity(64) == max(counts) == counts[-1]


@pytest.mark.parametrize(
    ("width", "fraction", "units"),
    [
        (14336, 0.2, 2867),  # 2867.2
        (18944, 0.2, 3789),  # 3788.8
        (10, 0.25, 3),  # 2.5: a half goes up
        (10, 0.05, 1),  # 0.5 goes up to 1
        (10, 0.001, 1),  # never none
        (10, 1, 10),
        (15, "0.1", 2),  # exactly 1.5; the binary tenth must not decide this
        (45, 0.7, 32),  # exactly 31.5, which binary floating point puts just below
    ],
)
def test_kept_units(width, fraction, units):
    assert Reduction(active_fraction=fraction).kept_units(width) == units


def test_kept_units_are_plain_integers():
    assert type(Reduction().kept_units(14336)) is int
    assert type(Reduction().probe_count(1792)) is int


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_range", 0),
        ("attention_range", 2.5),
        ("attention_range", True),
        ("active_fraction", 0),
        ("active_fraction", 1.01),
        ("active_fraction", "a fifth"),
        ("active_fraction", float("nan")),
        ("active_fraction", "0.12345678901234567890"),
        ("probe_fraction", -0.1),
        ("probe_fraction", True),
        ("probe_fraction", Fraction(1, 3)),
        ("probe", "stride"),
        ("window", "positions"),
    ],
)
def test_a_bad_reduction_names_the_field(field, value):
    with pytest.raises(UserError, match=field):
        Reduction(**{field: value})


def test_an_unknown_choice_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'strided'"):
        Reduction(probe="stride")


def test_plan_is_sorted_and_hashable():
    plan = Plan(attention=[5, np.int64(2)], ffn=(3, 1))
    assert plan == Plan((2, 5), (1, 3))
    assert hash(plan) == hash(Plan((2, 5), (1, 3)))
    assert all(type(layer) is int for layer in plan.attention)


@pytest.mark.parametrize("layers", [(1, 1), (-1,), (1.5,), (True,), "12", 3])
def test_a_bad_layer_list_is_refused(layers):
    with pytest.raises(UserError, match=r"plan\.ffn"):
        Plan(ffn=layers)


def test_a_layer_the_model_does_not_have():
    with pytest.raises(UserError, match=r"attention in layer 99, but the model has 12 layers \(0-11\)"):
        Plan(attention=(99,)).validate(12)
    with pytest.raises(UserError, match="ffn in layer 12"):
        Plan(ffn=(12,)).settings(12)
    Plan(attention=(11,), ffn=(0,)).validate(12)


def test_with_layer():
    plan = Plan(attention=(4,)).with_layer("ffn", 2).with_layer("attention", 1)
    assert plan == Plan(attention=(1, 4), ffn=(2,))
    with pytest.raises(UserError, match="layer 4 twice"):
        plan.with_layer("attention", 4)


def test_lowest_difference():
    base = Plan(attention=(5, 6), ffn=(3,))
    assert base.lowest_difference(base) is None
    assert base.lowest_difference(base.with_layer("attention", 4)) == 4
    assert base.lowest_difference(Plan(attention=(5, 6))) == 3
    assert base.lowest_difference(Plan(attention=(2, 5), ffn=(3,))) == 2


def test_runs_cover_the_layers():
    assert Plan().runs(3) == [(0, 3, FULL, FULL)]
    assert Plan(attention=(2, 3), ffn=(3, 4)).runs(6) == [
        (0, 2, FULL, FULL),
        (2, 3, STANDARD, FULL),
        (3, 4, STANDARD, STANDARD),
        (4, 5, FULL, STANDARD),
        (5, 6, FULL, FULL),
    ]
    assert Plan(attention=(0, 1), ffn=(0, 1)).runs(2) == [(0, 2, STANDARD, STANDARD)]
    assert LEVELLED.runs(6) == [
        (0, 1, FULL, FULL),
        (1, 2, STANDARD, FULL),
        (2, 3, 64, 0.5),
        (3, 4, TEXT, FULL),
        (4, 6, SKIP, SKIP),
    ]


def test_label():
    assert Plan().label() == "dense"
    assert Plan(ffn=(3,)).label() == "ffn 3"
    assert Plan(attention=(20, 21, 22), ffn=(1, 3, 4)).label() == "attention 20-22, ffn 1+3-4"
    assert LEVELLED.label() == "attention 1, attention range 64 2, attention to text 3, ffn fraction 0.5 2, frozen 4-5"
    assert Plan((), (), ((1, SKIP),), ((0, SKIP),)).label() == "attention skipped 1, ffn skipped 0"


def test_levels_are_sorted_hashable_and_checked():
    assert Plan((1,), (), [(5, SKIP), (4, SKIP), (3, 0), (np.int64(2), 64)], [(4, SKIP), (5, SKIP), (2, "0.50")]) == LEVELLED
    assert hash(LEVELLED) == hash(Plan.of(LEVELLED.reduced("attention"), LEVELLED.reduced("ffn")))
    assert [LEVELLED.level("attention", layer) for layer in range(6)] == [FULL, STANDARD, 64, TEXT, SKIP, SKIP]
    assert [LEVELLED.level("ffn", layer) for layer in range(6)] == [FULL, FULL, 0.5, FULL, SKIP, SKIP]
    assert LEVELLED.frozen == (4, 5)
    with pytest.raises(UserError, match="attention in layer 5, but the model has 5 layers"):
        LEVELLED.validate(5)


@pytest.mark.parametrize(
    ("levels", "complaint"),
    [
        ({"attention_levels": ((1, SKIP), (1, 5))}, r"plan\.attention_levels names layer 1 twice"),
        ({"ffn": (1,), "ffn_levels": ((1, SKIP),)}, r"plan\.ffn_levels names layer 1, which plan\.ffn names already"),
        ({"attention_levels": ((1, -1),)}, r"attention_levels: layer 1: the range must be a whole number from 0 .*, not -1"),
        ({"attention_levels": ((1, 2.0),)}, "the range must be a whole number"),
        ({"attention_levels": ((1, True),)}, "the range must be a whole number"),
        ({"attention_levels": ((1, "text"),)}, "the range must be a whole number from 0 .attention to text only."),
        ({"ffn_levels": ((2, 0),)}, 'plan.ffn_levels: layer 2: the fraction must be above 0 and below 1, not 0; .*"skip": true'),
        ({"ffn_levels": ((2, 1.0),)}, "all units are the dense FFN, so leave the layer out"),
        ({"ffn_levels": ((2, 1.5),)}, "layer 2: the fraction must be a decimal number"),
        ({"ffn_levels": ((2, False),)}, "layer 2: the fraction must be a decimal number"),
        ({"ffn_levels": ((-1, 0.5),)}, "a layer must be a whole number"),
    ],
)
def test_a_bad_level_is_refused(levels, complaint):
    with pytest.raises(UserError, match=complaint):
        Plan(**levels)


def test_the_standard_range_is_not_text_only():
    with pytest.raises(
        UserError, match="attention_range must be at least 1; attention to text only is the range 0 of attention_l"
    ):
        Reduction(attention_range=0)


def test_with_level_replaces():
    plan = Plan((4,)).with_level("attention", 4, SKIP).with_level("ffn", 4, 0.5).with_level("ffn", 3, STANDARD)
    assert plan == Plan((), (3,), ((4, SKIP),), ((4, 0.5),))
    assert plan.with_level("attention", 4, FULL).with_level("ffn", 4, STANDARD) == Plan((), (3, 4))
    with pytest.raises(UserError, match=r"plan\.attention_levels names layer 4, which plan\.attention names already"):
        plan.with_layer("attention", 4)


def test_lowest_difference_of_levels():
    assert LEVELLED.lowest_difference(LEVELLED) is None
    assert LEVELLED.lowest_difference(LEVELLED.with_level("ffn", 3, SKIP)) == 3
    assert LEVELLED.lowest_difference(LEVELLED.with_level("attention", 2, 63)) == 2
    assert LEVELLED.lowest_difference(LEVELLED.with_level("attention", 5, TEXT)) == 5


def test_indices_into_the_levels_of_a_run():
    levels = Levels((FULL, STANDARD, 64, TEXT, SKIP), (FULL, 0.5, SKIP))
    attention, ffn = LEVELLED.indices(6, levels)
    assert attention.dtype == ffn.dtype == np.int32
    assert attention.tolist() == [0, 1, 2, 3, 4, 4]
    assert ffn.tolist() == [0, 0, 1, 0, 2, 2]
    assert [places.tolist() for places in Plan((1, 3), (0,)).indices(4, STANDARD_LEVELS)] == [[0, 1, 0, 1], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match="64 is not among the attention levels full, standard"):
        LEVELLED.indices(6, STANDARD_LEVELS)


@pytest.mark.parametrize("levels", [(STANDARD, FULL), (FULL, SKIP, TEXT), (FULL, 3, 3), ()])
def test_a_run_has_distinct_levels_from_full_to_skip(levels):
    with pytest.raises(ValueError, match="full first and skip last"):
        Levels(attention=levels)


def test_a_chain_leaves_out_more_and_more():
    reduction = Reduction(attention_range=32, active_fraction=0.25)
    assert chain("attention", (SKIP, TEXT, 64, STANDARD, 256, 32), reduction) == (FULL, 256, 64, STANDARD, TEXT, SKIP)
    assert chain("ffn", (SKIP, 0.1, STANDARD, 0.5), reduction) == (FULL, 0.5, STANDARD, 0.1, SKIP)
    assert chain("ffn", (STANDARD, SKIP), Reduction(active_fraction=1)) == (FULL, SKIP)


def test_fields_and_back():
    assert Plan((1,), (0,)).fields() == {"attention": [1], "ffn": [0]}
    fields = LEVELLED.with_level("attention", 0, SKIP).fields()
    assert fields == {
        "attention": [1],
        "ffn": [],
        "attention_levels": [{"layers": [2], "range": 64}, {"layers": [3], "range": 0}, {"layers": [0], "skip": True}],
        "ffn_levels": [{"layers": [2], "fraction": 0.5}],
        "freeze": [4, 5],
    }
    assert Plan.from_fields(fields) == LEVELLED.with_level("attention", 0, SKIP)
