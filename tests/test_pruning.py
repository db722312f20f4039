import pytest

from rlens_jax.errors import UserError
from rlens_jax.pruning import VTW, FastV, Folder


@pytest.mark.parametrize("share", [1, 1.0, "1.0", -0.1, 2, "nan", "a third", True, None])
@pytest.mark.parametrize("method", [FastV, Folder])
def test_a_share_that_leaves_nothing_or_is_none_is_refused(method, share):
    with pytest.raises(UserError, match=rf"{method.__name__}: share must be .* below 1, not {share!r}"):
        method(share=share)


@pytest.mark.parametrize("layer", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("method", [FastV, VTW])
def test_a_layer_to_prune_after_is_a_whole_number(method, layer):
    with pytest.raises(UserError, match=rf"{method.__name__}: layer must be a whole number, at least 1"):
        method(layer=layer)


@pytest.mark.parametrize("method", [FastV, VTW])
def test_pruning_after_the_last_layer_is_refused(method):
    method(layer=11).validate(12)
    for layer in (12, 99):
        with pytest.raises(UserError, match=rf"after layer {layer}, but the model has 12 layers; choose 1 to 11"):
            method(layer=layer).validate(12)


def test_how_many_visual_tokens_are_left():
    assert [FastV(share=0.3).kept(n) for n in (0, 1, 2, 10, 1792)] == [0, 1, 1, 7, 1254]
    assert [Folder(share="0.7").kept(n) for n in (0, 1, 10, 100)] == [0, 1, 3, 30]
    assert [FastV(share=0).kept(n) for n in range(4)] == [0, 1, 2, 3]
    assert VTW(3).kept(1792) == 0
    kept = [FastV(share=0.65).kept(n) for n in range(200)]
    assert kept == sorted(kept)


def test_pruning_is_hashable_and_says_what_it_is():
    assert {FastV(2, "0.50"), FastV(2, 0.5)} == {FastV()}
    labels = [pruning.label() for pruning in (FastV(3, 0.3), VTW(15), Folder(0.665))]
    assert labels == ["FastV after layer 3 drops 30 %", "VTW after layer 15", "FOLDER-style merging of 66.5 %"]
