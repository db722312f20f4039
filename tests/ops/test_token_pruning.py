"""Scores, survivors and merging, each against a plain version."""

from decimal import ROUND_FLOOR, Decimal
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.layout import PADDING_POSITION, keep_visual, visible
from rlens_jax.ops import token_pruning
from rlens_jax.ops.token_pruning import attention_received, mean_of_heads, merge_similar, most_attended, recycle, survivors_of
from rlens_jax.pruning import FastV, Folder
from tests.numerics import assert_close
from tests.sequences import make_layout, pack, random_rows, run_length, spell
from tests.torch_reductions import Left, recycled

MASKS = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 1, 1, 3), run_length(7), run_length(1, 1, 3)]


def merged_slowly(rows: np.ndarray, is_visual: np.ndarray, share: str, width: int | None = None) -> tuple[np.ndarray, list[int]]:
    """The survivors of one sample and their places in the sequence; rows [T, D] of which text is not looked at.

    With a `width`, only so many numbers of each row are compared.
    """

    def kept(count: int) -> int:
        return min(count, max(1, int((count * (1 - Decimal(share))).to_integral_value(ROUND_FLOOR))))

    images: list[list[int]] = []
    for token in np.flatnonzero(is_visual).tolist():
        if images and images[-1][-1] == token - 1:
            images[-1].append(token)
        else:
            images.append([token])
    vectors, places, so_far = [], [], 0
    for image in images:
        target = kept(so_far + len(image)) - (kept(so_far) if so_far else 0)
        so_far += len(image)
        tokens = [(place, rows[place].astype(np.float64), 1) for place in image] if target else []
        while len(tokens) > target:
            sources, goals = tokens[::2], tokens[1::2]
            found = []
            for i, (_, a, _) in enumerate(sources):
                a = a[:width]
                cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in (x[:width] for _, x, _ in goals)]
                found.append((-max(cosines), i, int(np.argmax(cosines))))
            going = sorted(found)[: min(len(tokens) - target, len(tokens) // 2)]
            members = {j: [goals[j]] for j in range(len(goals))}
            for _, i, j in going:
                members[j].append(sources[i])
            gone = {i for _, i, _ in going}
            tokens = [token for i, token in enumerate(sources) if i not in gone]
            for j, group in members.items():
                size = sum(s for _, _, s in group)
                tokens.append((goals[j][0], sum(x * s for _, x, s in group) / size, size))
            tokens.sort(key=lambda token: token[0])
        vectors += [x for _, x, _ in tokens]
        places += [place for place, _, _ in tokens]
    return np.array(vectors, np.float32).reshape(-1, rows.shape[1]), places


def test_scores_are_rows_of_the_attention_weights_averaged_over_queries_and_heads(monkeypatch):
    """One query, or several of which some ask, in blocks that overlap; all heads, or those that give most to the image."""
    monkeypatch.setattr(token_pruning, "SCORED_QUERIES", 4)
    rng = np.random.default_rng(0)
    layout = make_layout(MASKS, spare=(1, 2))
    batch, slots, num_text = len(MASKS), layout.bucket.slots, layout.bucket.text
    q, k = (rng.standard_normal((batch, heads, slots, 4)).astype(np.float32) for heads in (6, 2))
    visible_keys = np.asarray(visible(layout.slots, layout.slots, None))
    last = np.asarray(layout.num_text)[:, None] - 1
    several = np.arange(num_text)[None].repeat(batch, axis=0)
    for rows, asks, best in ((last, last >= 0, None), (several, (several % 3 > 0) & (several <= last), 2)):
        sees = visible_keys[np.arange(batch)[:, None], rows]
        queries = jnp.asarray(np.take_along_axis(q, rows[:, None, :, None], axis=2))
        by_head = attention_received(queries, jnp.asarray(k), partial(jnp.take, jnp.asarray(sees), axis=1), jnp.asarray(asks))
        ours = mean_of_heads(by_head, slice(num_text, None), best)
        for i in range(batch):
            weights = np.zeros((6, slots))
            for head, row in product(range(6), rows[i][asks[i]]):
                grown = np.where(visible_keys[i, row], np.exp(q[i, head, row].astype(np.float64) @ k[i, head // 3].T / 2), 0)
                weights[head] += grown / grown.sum() / asks[i].sum()
            assert_close(by_head[i], weights, 1e-6)
            chosen = np.argsort(-weights[:, num_text:].sum(axis=1), kind="stable")[:best]
            assert_close(ours[i], weights[chosen].mean(axis=0), 1e-6)
            assert not np.asarray(ours[i])[~sees[i].any(axis=0)].any()


def test_survivors_keep_their_order_and_padding_never_survives():
    layout = make_layout([spell("t vvvv v t"), spell("t vv t"), spell("tt")])
    scores = jnp.asarray([[1, 5, 2, 5, 4], [-3, -4, 9, 9, 9], [7, 7, 7, 7, 7]], jnp.float32)
    kept = jnp.asarray([3, 1, 0])
    assert most_attended(scores, layout, kept, 3).tolist() == [[1, 3, 4], [0, 5, 5], [5, 5, 5]]
    assert most_attended(scores, layout, jnp.asarray([1, 2, 0]), 2).tolist() == [[1, 5], [0, 1], [5, 5]]


@pytest.mark.torch
def test_dropped_tokens_are_merged_around_peaks_of_density():
    """Of 120, 7 and 0 dropped tokens, 37, 3 and 0 become 4, 1 and 0; the last numbers of a token are taken along."""
    rng = np.random.default_rng(6)
    count, width, dropped = 130, 5, np.zeros((3, 130), bool)
    for row, number in enumerate((120, 7, 0)):
        dropped[row, rng.permutation(count)[:number]] = True
    tokens, scores = rng.standard_normal((3, count, 8)).astype(np.float32), rng.random((3, count)).astype(np.float32)
    merged, centres = map(np.asarray, jax.jit(recycle, static_argnums=(3, 4))(tokens, scores, dropped, 125, width))
    assert centres.sum(axis=1).tolist() == [4, 1, 0]
    for row in range(3):
        x, everyone = torch.from_numpy(tokens[row]), torch.ones(count, dtype=torch.bool)
        left = Left(np.flatnonzero(~dropped[row]).tolist(), 1.0)
        expected = recycled(left, torch.from_numpy(scores[row]), x, everyone, width)
        assert expected.gap > 1e-4
        assert np.flatnonzero(centres[row] | ~dropped[row]).tolist() == expected.tokens
        assert_close(merged[row], x if expected.states is None else expected.states, 1e-6)


def test_equal_tokens_have_their_centre_at_the_lower_ordinal():
    """The authors' code adds noise to tell them apart."""
    tokens = jnp.ones((1, 6, 3))
    _, centres = recycle(tokens, jnp.ones((1, 6)), jnp.asarray([[False, True, True, True, True, False]]), 4, 3)
    assert np.flatnonzero(centres[0]).tolist() == [1]


def test_what_is_left_is_packed_and_numbered_anew():
    layout = make_layout([spell("t vvv t vv t"), spell("v t"), spell("ttt")], spare=(1, 0))
    left = keep_visual(layout, jnp.asarray([[1, 2, 4], [0, 5, 5], [5, 5, 5]]), jnp.asarray([3, 1, 0]))
    none = PADDING_POSITION
    # t v v t v t; v t; t t t
    assert left.text_position.tolist() == [[0, 3, 5, none], [1, none, none, none], [0, 1, 2, none]]
    assert left.visual_position.tolist() == [[1, 2, 4], [0, none, none], [none] * 3]
    assert (left.num_text + left.num_visual).tolist() == [6, 2, 3]
    assert left.seed.tolist() == layout.seed.tolist()


def test_nobody_gone_is_the_same_layout():
    layout = make_layout(MASKS, spare=(2, 3))
    slots = jnp.broadcast_to(jnp.arange(layout.bucket.visual), layout.visual_position.shape)
    for ours, same in zip(jax.tree.leaves(keep_visual(layout, slots, layout.num_visual)), jax.tree.leaves(layout), strict=True):
        np.testing.assert_array_equal(ours, same)


def test_survivors_are_counted_in_exact_decimals():
    layout = make_layout([run_length(1, n) for n in (1, 10, 3)] + [run_length(2)])
    # 0.3 of 10 tokens is 3, though 10 * (1 - 0.7) < 3 in floating point; one token is left in any case.
    for share, expected in ((0.7, [1, 3, 1, 0]), (0.5, [1, 5, 1, 0])):
        assert survivors_of(layout.bucket.visual, FastV(1, share).kept)[layout.num_visual].tolist() == expected


def test_merging_equals_a_slow_version():
    """Several rounds, several images, an image too small to keep a token."""
    layout = make_layout(MASKS, spare=(1, 2))
    rows = random_rows(np.random.default_rng(5), MASKS, 6)
    visual = jnp.asarray(pack(rows, layout, lambda shape: np.full(shape, 1e3, np.float32))[:, layout.bucket.text :])
    for share in ("0.3", "0.5", "0.85"):
        pruning = Folder(share)
        merged, ordinals = jax.jit(merge_similar, static_argnums=(2, 3))(visual, layout, pruning, visual.shape[2])
        assert merged.shape[1] == ordinals.shape[1] == pruning.kept(layout.bucket.visual)
        for i, mask in enumerate(MASKS):
            expected, places = merged_slowly(rows[i], mask, share)
            visual_places = np.flatnonzero(mask).tolist()
            count = len(places)
            assert count == pruning.kept(len(visual_places))
            assert ordinals[i, :count].tolist() == [visual_places.index(place) for place in places]
            assert (np.asarray(ordinals[i, count:]) == layout.bucket.visual).all()
            assert_close(merged[i, :count], expected, 1e-5)
    assert (np.asarray(layout.num_visual) > 2).sum() == 2
