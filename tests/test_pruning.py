from itertools import pairwise

import pytest

from rlens_jax.drops import DART, PyramidDrop, SparseVLM
from rlens_jax.errors import UserError
from rlens_jax.flops import mean_visual, visual_in_layer
from rlens_jax.pruning import VTW, FastV, Folder


@pytest.mark.parametrize("share", [1, 1.0, "1.0", -0.1, 2, "nan", "a third", True])
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
    assert FastV(2, 0.5) != FastV(2, 0.5, attention="all_tokens")
    expected = {
        FastV(3, 0.3): "FastV after layer 3 drops 30 %",
        FastV(2, keep=192, attention="all_tokens"): "FastV after layer 2 keeps 192 tokens, by the attention of all tokens",
        VTW(15): "VTW after layer 15",
        Folder(0.665): "FOLDER-style merging of 66.5 %",
        PyramidDrop(): "PyramidDrop keeps 50, 25, 12.5 %",
        SparseVLM([300, 200, 118], layers=[3, 7, 16]): "SparseVLM 2 after layers 3, 7, 16 keeps 300, 200, 118 tokens",
        DART(keep=0.3, positions="renumbered"): "DART after layer 2 keeps 30 %, positions renumbered",
    }
    assert {pruning: pruning.label() for pruning in expected} == expected


SPARSE = {
    "1.5": {(300, 200, 110): 206.5, (303, 110, 36): 145.41, (238, 48, 26): 114.09, (66, 30, 17): 82.25},
    "2": {(300, 200, 118): 206.75, (238, 108, 60): 144.13, (246, 54, 28): 113.94, (66, 34, 20): 81.81},
}


@pytest.mark.parametrize(
    ("pruning", "mean"),
    [
        *((FastV(2, keep=tokens), mean) for tokens, mean in ((192, 216), (128, 156), (64, 96), (166, 191.625))),
        (FastV(2, 0.5), 306),
        (PyramidDrop(), 270),
        (PyramidDrop((8, 16, 24)), 270),
        *((SparseVLM(tokens, version=version), mean) for version, table in SPARSE.items() for tokens, mean in table.items()),
        *((DART(tokens), mean) for tokens, mean in ((196, 219.75), (132, 159.75), (68, 99.75))),
    ],
    ids=lambda value: value.label() if hasattr(value, "label") else str(value),
)
def test_published_settings_have_the_mean_tokens_of_llava(pruning, mean):
    """576 visual tokens and 32 layers (policies of the methods' published code)."""
    assert mean_visual(visual_in_layer(pruning, 576, 32)) == pytest.approx(mean, abs=0.005)


def test_recycled_tokens_are_counted_as_published():
    pruning = SparseVLM((300, 200, 110), version="1.5")
    merged = [stage.kept(576) - pruning.chosen(step, 576) for step, stage in enumerate(pruning.stages(32))]
    assert merged == [9, 4, 3]
    assert [stage.layer for stage in pruning.stages(32)] == [3, 7, 16]
    assert [stage.layer for stage in pruning.stages(28)] == [2, 6, 14]
    assert [stage.layer for stage in PyramidDrop().stages(30)] == [7, 15, 22]
    assert [stage.layer for stage in PyramidDrop().stages(4)] == [stage.layer for stage in pruning.stages(4)] == [1, 2, 3]


@pytest.mark.parametrize(
    "pruning",
    [
        PyramidDrop(),
        SparseVLM((30, 20, 7)),
        SparseVLM((30, 20, 7), version="1.5"),
        SparseVLM(keep=(0.7, 0.5, 0.1), version="1.5"),
        DART(40),
    ],
    ids=lambda pruning: pruning.label(),
)
def test_counts_of_every_step_grow_with_the_image_and_shrink_with_the_steps(pruning):
    """Static shapes rely on both: the survivors of any sample fit into the slots of a full bucket."""
    counts = [[num, *(stage.kept(num) for stage in pruning.stages(32))] for num in range(200)]
    for smaller, larger in pairwise(counts):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    assert all(list(steps) == sorted(steps, reverse=True) for steps in counts)
    assert counts[0][-1] == 0
    assert counts[1][-1] == 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FastV(2, 0.5, 192), "FastV: give either share, which is dropped, or keep, the number of tokens that stay"),
        (lambda: FastV(keep=0), "FastV: keep must be a whole number, at least 1, not 0"),
        (lambda: FastV(attention="all"), "FastV: attention must be one of last_token, all_tokens, not 'all'"),
        (lambda: FastV(positions="keept"), "must be one of kept, renumbered, not 'keept' .did you mean 'kept'"),
        (lambda: PyramidDrop(keep=(0.25, 0.5)), r"PyramidDrop: keep must not rise, not \[0.25, 0.5\]: dropped tok"),
        (lambda: PyramidDrop((4, 8)), "PyramidDrop: keep must have a number for each of the 2 layers, not 3"),
        (lambda: PyramidDrop((8, 4, 9)), r"PyramidDrop: layers must rise, not \[8, 4, 9\]"),
        (lambda: PyramidDrop((0, 4, 9)), "PyramidDrop: layer must be a whole number, at least 1, not 0"),
        (lambda: PyramidDrop(8), "PyramidDrop: layers must be a list with a number for each step, at most 16, not 8"),
        (lambda: PyramidDrop().validate(3), "PyramidDrop prunes after layer 3, but the model has 3 layers; choose 1 to 2"),
        (lambda: SparseVLM(3), "SparseVLM: keep must be a list with a number for each step, at most 16, not 3"),
        (lambda: SparseVLM((3, 2, 0.5)), "SparseVLM: keep must be numbers of tokens or shares, not both"),
        (lambda: SparseVLM((3, 2)), "SparseVLM: without layers there are 3 steps, not 2; give layers"),
        (lambda: SparseVLM((3, 2, 9)), "SparseVLM: keep must not rise"),
        (lambda: SparseVLM((3, 2, 1), version="3"), "SparseVLM: version must be one of 1.5, 2, not '3'"),
        (lambda: DART(4, pivots_text=0), "DART: pivots_text must be a whole number, at least 1, not 0"),
        (
            lambda: DART("1.5"),
            "DART: keep, unless it is a whole number of tokens, must be a decimal number above 0 and at most 1",
        ),
        (lambda: DART(keep=0), "DART: keep must be at least 1 token and at most 2147483647, not 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()
