"""Parity with Hugging Face's Qwen2.5-VL in float32, through the real loader, and the windows of its tower."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.vision_utils import get_vision_window_index

from rlens_jax.errors import UserError
from rlens_jax.families.qwen2_5_vl.model import windows
from rlens_jax.families.qwen2_vl.preparer import patch_places
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.layers import mark_tokens, penalised
from rlens_jax.ops.attention import masked_attention
from rlens_jax.ops.tower_attention import attend_groups
from tests.families.contract import BOTH, SIMPLE, WHOLE, set_to, swap
from tests.families.pair import Pair, make_pair
from tests.families.published import kind_of
from tests.families.qwen2_5_vl import FULL_LAYERS, WINDOW, tiny_qwen2_5_vl
from tests.families.qwen2_vl import hf_inputs, make_example
from tests.families.qwen_contract import QwenContract, our_logits, their_logits
from tests.numerics import assert_close

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_qwen2_5_vl(0))


def with_tower(model: VisionLanguageModel, **changes: object) -> None:
    """Change sizes of the tower."""
    model.vision.config = replace(model.vision.config, **changes)


def lost_gate(model: VisionLanguageModel) -> None:
    """A plain MLP: every gate is open."""
    set_to(model.vision.layers.gate.kernel, 0)
    set_to(model.vision.layers.gate.bias, 1)


class TestQwen25VL(QwenContract):
    parts: ClassVar = {
        "two images with text between": [[4, (4, 14), 7, (8, 6), 9]],
        "ragged": [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13], [1, (12, 18), 6]],
    }
    batches: ClassVar = ("ragged",)
    reduced: ClassVar = [("ragged", BOTH)]
    mutations: ClassVar = {
        "windows_everywhere": lambda model: with_tower(model, full_layers=()),
        "windows_nowhere": lambda model: with_tower(model, full_layers=(0, 1, 2, 3)),
        "another_full_layer": lambda model: with_tower(model, full_layers=(1,)),
        "larger_windows": lambda model: with_tower(model, window=3),
        "lost_gate": lost_gate,
        "swapped_gate_and_up": lambda model: swap(model.vision.layers.gate.kernel, model.vision.layers.fc1.kernel),
        "dropped_gate_bias": lambda model: set_to(model.vision.layers.gate.bias, 0),
        "dropped_down_bias": lambda model: set_to(model.vision.layers.fc2.bias, 0),
        "swapped_vision_norms": lambda model: swap(model.vision.layers.attention_norm.scale, model.vision.layers.mlp_norm.scale),
        "lost_merger_norm": lambda model: set_to(model.vision.merger_norm.scale, 1),
        "dropped_merger_bias": lambda model: set_to(model.vision.merger_fc2.bias, 0),
        "dropped_query_bias": lambda model: set_to(model.decoder.layers.attention.q_proj.bias, 0),
    }
    mutated: ClassVar = "two images with text between"

    def their_features(self, pair: Pair, features: torch.Tensor, grids: torch.Tensor) -> np.ndarray:
        """They leave the tower window by window."""
        vision = pair.config.vision
        order, _ = get_vision_window_index(grids, vision.merge_size, WINDOW, vision.patch_size)
        groups = features.reshape(len(order), -1)[torch.argsort(order)]
        return groups.reshape(features.shape).numpy()


def test_logits_of_a_model_with_tied_head(tmp_path) -> None:
    pair = make_pair(tmp_path, tiny_qwen2_5_vl(3, tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-5))
    assert pair.config.decoder.tied_head
    examples = [make_example(1, [3, (6, 10), 5], pair.config)]
    for ours, theirs in zip(our_logits(pair.ours, pair.config, examples), their_logits(pair, examples), strict=True):
        assert_close(ours, theirs, WHOLE)


def test_every_norm_has_its_own_eps(pair: Pair) -> None:
    """Logits do not show it: here the squares of the states are as small as it."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((1, 7, 24)).astype(np.float32)
    block, ours = pair.theirs.model.visual.blocks[0], pair.ours.vision
    with torch.no_grad():
        expected = [norm(torch.tensor(x)).numpy() for norm in (block.norm1, block.norm2, pair.theirs.model.visual.merger.ln_q)]
    scales = ours.layers.attention_norm.scale[0], ours.layers.mlp_norm.scale[0], ours.merger_norm.scale[...]
    norms = ours.layers.attention_norm, ours.layers.mlp_norm, ours.merger_norm
    for norm, scale, theirs in zip(norms, scales, expected, strict=True):
        root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.eps)
        assert_close(x / root * np.asarray(scale), theirs, SIMPLE)
    published = kind_of("qwen2_5_vl").config.decoder
    assert (pair.config.decoder.norm_eps, published.norm_eps, pair.theirs.config.text_config.rms_norm_eps) == (1e-6,) * 3


def test_layers_that_see_the_whole_image(pair: Pair) -> None:
    assert pair.config.vision.full_layers == tuple(FULL_LAYERS)
    assert pair.config.vision.window == 2
    vision = kind_of("qwen2_5_vl").config.vision
    assert (vision.full_layers, vision.window) == ((7, 15, 23, 31), 4)


# Windows


numbered = jax.jit(windows, static_argnums=2)


def permuted(rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Merged tokens of a grid of patches window by window, as they are in merge order, and the patches of each window."""
    places = jnp.asarray(patch_places((rows, columns), 2))[None]
    window = numbered(places, jnp.ones(places.shape[:2], bool), 8)[0]
    order = np.argsort(np.asarray(window), stable=True)
    groups = order.reshape(-1, 4)
    assert (groups % 4 == np.arange(4)).all()
    _, counts = np.unique(np.asarray(window), return_counts=True)
    return (groups[:, 0] // 4).tolist(), counts.tolist()


def test_windows_are_cut_from_the_top_left() -> None:
    order, lengths = permuted(12, 18)
    assert order[:9] == [0, 1, 2, 3, 9, 10, 11, 12, 18]
    assert lengths == [64, 64, 16, 32, 32, 8]
    assert permuted(8, 16)[1] == [64, 64]
    assert len(permuted(78, 138)[1]) == 180


@pytest.mark.parametrize(("rows", "columns"), [(12, 18), (2, 50), (34, 2), (16, 24)])
def test_windows_are_those_of_transformers(rows: int, columns: int) -> None:
    order, ends = get_vision_window_index(torch.tensor([[1, rows, columns]]), 2, 112, 14)
    assert permuted(rows, columns) == (order.tolist(), ends.diff().tolist())


def test_attention_within_windows_equals_its_mask() -> None:
    """Of two images with padding, the patches window by window."""
    slots, side, rng = 76, 4, np.random.default_rng(0)
    numbers = []
    for grid in ((6, 10), (4, 18)):
        places = np.zeros((slots, 2), np.int32)
        places[: grid[0] * grid[1]] = patch_places(grid, 2)
        is_patch = np.arange(slots) < grid[0] * grid[1]
        numbers.append(np.sort(numbered(jnp.asarray(places)[None], jnp.asarray(is_patch)[None], side)[0]))
    window = jnp.asarray(np.stack(numbers))
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 3, slots, 4)), jnp.float32)
    measured = jax.jit(attend_groups, static_argnames="most")(q, k, v, window, most=side**2)
    plain = jax.jit(lambda: masked_attention(q, k, v, window[:, :, None] == window[:, None]))()
    real = np.asarray(window) < 10**6
    for ours, expected, mask in zip(measured, plain, real, strict=True):
        assert 0 < mask.sum() < slots
        assert_close(ours[:, mask], expected[:, mask], SIMPLE)


# Inputs


@pytest.mark.parametrize(
    ("size", "tokens"), [((1080, 1920), 2691), ((480, 640), 391), ((100, 100), 16), ((42, 70), 4), ((5000, 5000), 16129)]
)
def test_visual_tokens_by_height_and_width(size: tuple[int, int], tokens: int, tmp_path) -> None:
    measured, found = kind_of("qwen2_5_vl").measure(tmp_path, {})(*size[::-1])
    assert (measured, found.count) == ((4 * tokens,), tokens)


def test_videos_are_refused(pair: Pair) -> None:
    inputs = {name: tensor.numpy() for name, tensor in hf_inputs([make_example(1, [3, (6, 10), 5], pair.config)]).items()}
    read = kind_of("qwen2_5_vl").family.reference.read
    frames = inputs | {"image_grid_thw": inputs["image_grid_thw"] * [2, 1, 1]}
    with pytest.raises(UserError, match=r"^bundle: image_grid_thw has 2 frames; only images are supported$"):
        read("bundle", frames, pair.config, Path())
    video = inputs | {"input_ids": np.where(inputs["input_ids"] == 195, 196, inputs["input_ids"])}
    with pytest.raises(UserError, match=r"^bundle: input_ids has video tokens; only images are supported$"):
        read("bundle", video, pair.config, Path())


def test_a_penalty_of_negative_logits_and_of_tokens_seen_twice() -> None:
    rng = np.random.default_rng(5)
    logits, ids = rng.normal(size=(2, 1, 30)).astype(np.float32), np.array([[[3, 9, 3, 28]], [[0, 0, 29, 1]]], np.int32)
    counts = np.ones(ids.shape, bool)
    counts[1, 0, 3] = False
    seen = mark_tokens(jnp.zeros(logits.shape, bool), jnp.asarray(ids), jnp.asarray(counts))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)
    for row, count in ((0, 4), (1, 3)):
        expected = theirs(torch.tensor(ids[row, :, :count], dtype=torch.int64), torch.tensor(logits[row]))
        np.testing.assert_array_equal(penalised(jnp.asarray(logits), seen, 1.3)[row], expected)
    assert (logits[0, 0, ids[0, 0]] < 0).any() and (logits[0, 0, ids[0, 0]] > 0).any()
