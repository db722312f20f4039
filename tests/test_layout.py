import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.layout import Bucket, Slots, Tokens, pack_layout, pack_rows, unpack_rows, visible
from tests.sequences import bucket_for, fork, forked_layout, make_layout, run_length, spell, unpack
from tests.torch_reductions import hollow_mask

pytestmark = pytest.mark.torch

PICTURE = """
    t v v v t v t
t   1 0 0 0 0 0 0
v   1 1 0 0 0 0 0
v   1 1 1 0 0 0 0
v   1 0 1 1 0 0 0
t   1 1 1 1 1 0 0
v   1 0 0 1 1 1 0
t   1 1 1 1 1 1 1
"""
SAMPLES = [run_length(2, 7, 1, 4, 3), run_length(3), run_length(0, 5, 0, 2, 1), run_length(1, 13, 2, 1)]


def read_picture(text: str) -> tuple[str, np.ndarray]:
    """The letters and the 0/1 matrix of a picture, whatever text is around it."""
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line[1:] and set(line[1:]) <= {"0", "1"}]
    (heading,) = [line for line in lines if len(line) > 1 and max(map(len, line)) == 1 and set(line) <= set("tvab")]
    assert [row[0] for row in rows] == heading
    return "".join(heading), np.array([[int(cell) for cell in row[1:]] for row in rows], bool)


def pictures_of_visible() -> tuple[str, str]:
    """The two pictures in its docstring."""
    plain, _, branches = visible.__doc__.partition("A branch sees")
    return plain, branches


def sequence_mask(is_visual: np.ndarray, attention_range: int | None, window: str = "ordinal") -> np.ndarray:
    """What `visible` says about one sample, bool[T, T] in sequence order."""
    layout = make_layout([is_visual], spare=(2, 3))
    mask = np.asarray(visible(layout.slots, layout.slots, attention_range, window))
    (rows,) = unpack(mask, layout)
    (columns,) = unpack(rows.T[None], layout)
    return columns.T


def test_visible_is_the_picture():
    letters, expected = read_picture(PICTURE)
    np.testing.assert_array_equal(sequence_mask(spell(letters), 2), expected)


def test_visible_is_the_picture_with_branches():
    letters, expected = read_picture(pictures_of_visible()[1])
    assert letters == "tvvtaabb"
    layout = forked_layout([fork(spell("tvvt"), [2, 2])], spare=(2, 3))
    (rows,) = unpack(np.asarray(visible(layout.slots, layout.slots, 1)), layout)
    np.testing.assert_array_equal(unpack(rows.T[None], layout)[0].T, expected)


def test_the_picture_in_the_docstring_is_the_same():
    for ours, tested in zip(read_picture(pictures_of_visible()[0]), read_picture(PICTURE), strict=True):
        np.testing.assert_array_equal(ours, tested)


def test_the_torch_mask_is_the_picture():
    letters, expected = read_picture(PICTURE)
    np.testing.assert_array_equal(hollow_mask(torch.tensor(spell(letters)), 2).numpy(), expected)


@pytest.mark.parametrize("window", ["ordinal", "position"])
@pytest.mark.parametrize("attention_range", [None, 1, 2, 5, 100])
def test_visible_equals_the_torch_mask(attention_range, window):
    for is_visual in SAMPLES:
        expected = hollow_mask(torch.tensor(is_visual), attention_range, window).numpy()
        np.testing.assert_array_equal(sequence_mask(is_visual, attention_range, window), expected)


def test_the_windows_differ_only_where_text_lies_between():
    one_image, two_images = run_length(2, 9, 3), run_length(2, 5, 2, 4)
    np.testing.assert_array_equal(sequence_mask(one_image, 3), sequence_mask(one_image, 3, "position"))
    assert (sequence_mask(two_images, 3) & ~sequence_mask(two_images, 3, "position")).any()
    assert not (~sequence_mask(two_images, 3) & sequence_mask(two_images, 3, "position")).any()


def test_no_token_sees_an_empty_slot():
    layout = make_layout(SAMPLES, spare=(3, 2))
    mask = np.asarray(visible(layout.slots, layout.slots, None))
    text, visual = layout.bucket.text, layout.bucket.visual
    for row in range(len(SAMPLES)):
        full = np.concatenate([np.arange(text) < layout.num_text[row], np.arange(visual) < layout.num_visual[row]])
        assert not mask[row][np.ix_(full, ~full)].any()


def test_pack_layout_of_two_images():
    layout = pack_layout([Tokens.sequence(spell(text)) for text in ("tvvtv", "tt")], Bucket(text=3, visual=4), [7, 9])
    empty = 2**30
    np.testing.assert_array_equal(layout.text_position, [[0, 3, empty], [0, 1, empty]])
    np.testing.assert_array_equal(layout.visual_position, [[1, 2, 4, empty], [empty] * 4])
    assert (layout.num_text.tolist(), layout.num_visual.tolist(), layout.seed.tolist()) == ([2, 2], [3, 0], [7, 9])
    slots = make_layout([spell("tvvtv")]).slots
    assert isinstance(slots, Slots)
    np.testing.assert_array_equal(slots.ordinal, [[-1, -1, 0, 1, 2]])


def test_packing_and_unpacking_are_inverse():
    rng = np.random.default_rng(0)
    bucket = bucket_for(SAMPLES, spare=(1, 5))
    layout = pack_layout([Tokens.sequence(mask) for mask in SAMPLES], bucket, range(len(SAMPLES)))
    rows = [rng.standard_normal((len(mask), 2)).astype(np.float32) for mask in SAMPLES]
    packed = pack_rows(rows, layout)
    assert packed.shape == (len(SAMPLES), bucket.slots, 2)
    for row, back, mask, run in zip(rows, unpack_rows(packed, layout), SAMPLES, packed, strict=True):
        np.testing.assert_array_equal(back, row)
        np.testing.assert_array_equal(run[bucket.text : bucket.text + mask.sum()], row[mask])
        assert not run[bucket.text + mask.sum() :].any()


def test_a_sample_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="row 0 has 3 tokens for 2 slots"):
        pack_layout([Tokens.sequence(spell("tvvv"))], Bucket(text=4, visual=2), [5])


def test_more_branches_or_text_than_places_are_an_error():
    with pytest.raises(ValueError, match="row 0 has 2 text tokens before visual ones for 1 slots"):
        pack_layout([Tokens.sequence(spell("tvtvt"))], Bucket(text=6, visual=2), [5], leading_text=1)
    with pytest.raises(ValueError, match="row 1 has 3 branches for 2 places"):
        pack_layout([fork(spell("tv"), lengths) for lengths in ([1, 1], [1, 1, 1])], Bucket(text=6, visual=2), [5, 6], 2)


def test_the_layout_is_a_pytree_of_arrays():
    layout = make_layout([spell("tvt")])
    assert layout.bucket == Bucket(text=2, visual=1)
    assert all(isinstance(slots.position, jnp.ndarray) for slots in (layout.text, layout.visual))
