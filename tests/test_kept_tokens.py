"""Budgets of the baselines that choose visual tokens before the first layer."""

from math import isqrt

import pytest

from rlens_jax.errors import UserError
from rlens_jax.kept_tokens import CDPruner, DivPrune, FasterVLM, Pooling, RandomTokens, StridedTokens, VisionZip

METHODS = [RandomTokens, StridedTokens, Pooling, DivPrune, CDPruner, FasterVLM, VisionZip]


def test_a_whole_number_counts_tokens_and_a_decimal_is_a_share() -> None:
    assert [StridedTokens(64).kept(n) for n in (0, 1, 64, 576)] == [0, 1, 64, 64]
    assert [StridedTokens(1).kept(n) for n in (0, 1, 576)] == [0, 1, 1]
    assert [StridedTokens(1.0).kept(n) for n in (0, 1, 576)] == [0, 1, 576]
    assert {StridedTokens("64"), StridedTokens(64)} == {StridedTokens(64)}
    assert StridedTokens("0.250") == StridedTokens(0.25) != StridedTokens(0.5)
    assert StridedTokens(0.25) != RandomTokens(0.25)
    # 56.448, and halves to even: 0.5, 1.5, 2.5.
    assert DivPrune().kept(576) == 56
    assert [DivPrune(0.5).kept(n) for n in (0, 1, 3, 5)] == [0, 1, 2, 2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0, -3, 1.5, 64.0, "x", None, True, [64], 0.0, "nan", 2**40, "9" * 100])
def test_another_budget_is_refused(method, keep) -> None:
    with pytest.raises(UserError, match=rf"^{method(1).title.split()[0]}.*: keep.* must be "):
        method(keep)


def test_pooling_fits_the_budget() -> None:
    """13, 11 and 8 cells a side for 192, 128 and 64 tokens of LLaVA-1.5; several images share a budget."""
    assert [Pooling(keep).kept(576) for keep in (192, 128, 64)] == [169, 121, 64]
    assert [Pooling(64).kept(n) for n in (0, 576, 1152, 1728)] == [0, 64, 50, 48]
    assert Pooling(1.0).kept(1152) == 1152
    assert Pooling(0.25, side=16).kept(256 * 13) == 64 * 13
    for slots in (576, 640, 1152, 1300):
        pooling = Pooling(100)
        assert pooling.capacity(slots) == max(pooling.kept(n) for n in range(slots + 1))
        assert pooling.capacity(slots) >= isqrt(100) ** 2
    Pooling(3).check_sample("q", 1728)
    Pooling(3).check_sample("q", 0)
    with pytest.raises(
        UserError, match=r"^q: pooling leaves each of 4 images or tiles at least one token; keep 4 tokens or more$"
    ):
        Pooling(3).check_sample("q", 4 * 576)
    with pytest.raises(UserError, match="pooling: side must be a whole number from 1 to 1024, not 0"):
        Pooling(64, side=0)


def test_the_published_splits_of_visionzip() -> None:
    assert [(keep - VisionZip(keep).contextual(576), VisionZip(keep).contextual(576)) for keep in (192, 128, 64)] == [
        (162, 30),
        (108, 20),
        (54, 10),
    ]
    assert [VisionZip(64).contextual(n) for n in (0, 6, 7, 64)] == [0, 0, 1, 10]
    with pytest.raises(UserError, match="VisionZip: merge must be 'sum' or 'mean', not 'max'"):
        VisionZip(64, merge="max")


def test_labels() -> None:
    labels = [method(keep).label() for method, keep in zip(METHODS, (64, 0.25, 8, "0.098", 1, 2, 3), strict=True)]
    assert labels == [
        "random keeps 64 visual tokens",
        "strided keeps 25 % of the visual tokens",
        "pooling keeps 8 visual tokens",
        "DivPrune keeps 9.8 % of the visual tokens",
        "CDPruner (embeddings) keeps 1 visual tokens",
        "FasterVLM keeps 2 visual tokens",
        "VisionZip keeps 3 visual tokens",
    ]
    assert DivPrune(64, positions="renumbered").label() == "DivPrune keeps 64 visual tokens, positions renumbered"
    with pytest.raises(UserError, match="VisionZip: positions must be one of kept, renumbered, not 'keep'"):
        VisionZip(64, positions="keep")
