from fractions import Fraction

import numpy as np
import pytest

from rlens_jax.errors import UserError
from rlens_jax.plans import Plan, Reduction


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
        Plan(ffn=(12,)).flags(12)
    Plan(attention=(11,), ffn=(0,)).validate(12)


def test_flags():
    hollow, dynamic = Plan(attention=(1, 3), ffn=(0,)).flags(4)
    assert hollow.dtype == dynamic.dtype == np.bool_
    assert hollow.tolist() == [False, True, False, True]
    assert dynamic.tolist() == [True, False, False, False]
    assert not any(flag.any() for flag in Plan().flags(4))


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
    assert Plan().runs(3) == [(0, 3, False, False)]
    assert Plan(attention=(2, 3), ffn=(3, 4)).runs(6) == [
        (0, 2, False, False),
        (2, 3, True, False),
        (3, 4, True, True),
        (4, 5, False, True),
        (5, 6, False, False),
    ]
    assert Plan(attention=(0, 1), ffn=(0, 1)).runs(2) == [(0, 2, True, True)]


def test_label():
    assert Plan().label() == "dense"
    assert Plan(ffn=(3,)).label() == "ffn 3"
    assert Plan(attention=(20, 21, 22), ffn=(1, 3, 4)).label() == "attention 20-22, ffn 1+3-4"
