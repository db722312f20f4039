"""The table engine, on made-up tables."""

import numpy as np
import pytest

from rlens_jax.errors import UserError
from rlens_jax.families.table import MAX_PROBLEMS, Found, Ignored, Part, Problems, Row, Table, match

SIZES = {"n": 6, "k": 2, "group": 3, "h": 5, "d": 7, "v": 11}
GROUPED = Row(
    "wqkv", ("q", "k", "v"), "(k all h) d -> all d k h", ("group d k h -> d (k group) h", "1 d k h -> d k h", "1 d k h -> d k h")
)
TABLE = Table(
    parts=(
        Part("", "", SIZES, (Row("embed", "embedding", "v d -> v d"),)),
        Part(
            "layers.{layer}.",
            "stack.",
            SIZES,
            (GROUPED, Row("norm", "scale", "d -> d"), Row("flat", ("a", "b"), "(two n) -> two n")),
            num_layers=2,
        ),
    ),
    renames=((r"^new\.", ""), (r"^(model|old)\.", "")),
    ignored=(Ignored(r"layers\.\d+\.unused", "for the test"),),
    copies={"head": "embed"},
)
SHAPES = {
    "embedding": (11, 7),
    "stack.q": (2, 7, 6, 5),
    "stack.k": (2, 7, 2, 5),
    "stack.v": (2, 7, 2, 5),
    "stack.scale": (2, 7),
    "stack.a": (2, 6),
    "stack.b": (2, 6),
}


def everything() -> list[Found]:
    return [Found(name, "a.safetensors", tensor.shape) for name, tensor in TABLE.tensors.items()]


def complaints(found: list[Found]) -> list[str]:
    problems = Problems("FOLDER")
    match(TABLE, found, problems)
    with pytest.raises(UserError) as error:
        problems.raise_any()
    return str(error.value).split("\n  ")


def test_names_and_shapes_come_from_the_rows():
    assert list(TABLE.tensors) == [
        "embed",
        "layers.0.wqkv",
        "layers.1.wqkv",
        "layers.0.norm",
        "layers.1.norm",
        "layers.0.flat",
        "layers.1.flat",
    ]
    assert TABLE.tensors["layers.1.wqkv"].shape == (2 * (3 + 2) * 5, 7)
    assert TABLE.tensors["layers.1.flat"].shape == (12,)
    TABLE.check_covers(SHAPES)


def test_a_grouped_tensor_is_cut_within_each_group():
    tensor = TABLE.tensors["layers.0.wqkv"]
    array = np.random.default_rng(0).normal(size=tensor.shape).astype(np.float32)
    q, k, v = tensor.to_ours(array)
    assert [x.shape for x in (q, k, v)] == [(7, 6, 5), (7, 2, 5), (7, 2, 5)]
    for head in range(2):
        rows = array[head * 25 : (head + 1) * 25]
        for member in range(3):
            np.testing.assert_array_equal(q[:, head * 3 + member], rows[member * 5 : member * 5 + 5].T)
        np.testing.assert_array_equal(k[:, head], rows[15:20].T)
        np.testing.assert_array_equal(v[:, head], rows[20:25].T)
    np.testing.assert_array_equal(tensor.to_published([q, k, v]), array)


def test_a_flat_tensor_is_cut_in_order():
    tensor = TABLE.tensors["layers.1.flat"]
    a, b = tensor.to_ours(np.arange(12))
    assert a.tolist() == [0, 1, 2, 3, 4, 5]
    assert b.tolist() == [6, 7, 8, 9, 10, 11]
    assert tensor.to_published([a, b]).tolist() == list(range(12))


def test_all_spellings_are_one():
    names = {"embed", "new.embed", "new.model.embed", "old.embed"}
    assert {TABLE.published_name(name) for name in names} == {"embed"}


def test_complete_checkpoint_matches():
    problems = Problems("FOLDER")
    found = [*everything(), Found("layers.0.unused", "a", (1,)), Found("new.head", "a", (11, 7))]
    matched = match(TABLE, found, problems)
    problems.raise_any()
    assert matched.keys() == {*TABLE.tensors, "head"}
    assert matched["head"].name == "new.head"


def test_everything_wrong_is_told_at_once():
    found = [item for item in everything() if item.name not in ("layers.0.norm", "embed")]
    found += [
        Found("layers.0.nrom", "a.safetensors", (7,)),
        Found("embed", "a.safetensors", (7, 11)),
        Found("old.layers.1.norm", "b.safetensors", (7,)),
        Found("head", "b.safetensors", (10, 7)),
    ]
    title, *lines = complaints(found)
    assert title == "FOLDER: 5 problems with the weights"
    assert lines == [
        "a.safetensors: layers.0.nrom: not known (did you mean 'layers.0.norm'?)",
        "a.safetensors: embed: has shape [7, 11], expected [11, 7]",
        "b.safetensors: old.layers.1.norm: doubled, it is also in a.safetensors as layers.1.norm",
        "b.safetensors: head: has shape [10, 7], expected [11, 7]",
        "FOLDER: layers.0.norm: missing, expected with shape [7]",
    ]


def test_a_long_list_is_cut():
    found = [*everything(), *(Found(f"junk{i}", "a", (1,)) for i in range(MAX_PROBLEMS + 5))]
    title, *lines = complaints(found)
    assert title == f"FOLDER: {MAX_PROBLEMS + 5} problems with the weights"
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == "... and 5 more"


def test_a_tensor_of_no_table_is_not_ignored_by_a_part_of_its_name():
    assert "layers.0.unused.more: not known" in complaints([*everything(), Found("layers.0.unused.more", "a", (1,))])[1]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "forgotten": (3,)}, "forgotten: filled"),
        ({name: shape for name, shape in SHAPES.items() if name != "stack.v"}, "no parameter stack.v"),
        ({**SHAPES, "stack.scale": (2, 8)}, r"gives stack.scale \(7,\) where it has \(8,\)"),
        ({**SHAPES, "stack.scale": (3, 7)}, "stack.scale: filled"),
    ],
)
def test_a_wrong_table_is_noticed(shapes, message):
    with pytest.raises(ValueError, match=message):
        TABLE.check_covers(shapes)


def test_two_rows_into_one_place_are_noticed():
    twice = Table((*TABLE.parts, Part("", "", SIZES, (Row("other", "embedding", "v d -> v d"),))))
    with pytest.raises(ValueError, match="embedding: filled"):
        twice.check_covers(SHAPES)
