"""Parity with Hugging Face's LLaVA-OneVision in float32, through the real loader: parts, whole, reduced, decoding."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.families import anyres
from rlens_jax.families.llava_onevision import preparer as llava_onevision
from rlens_jax.families.llava_onevision.preparer import grid_sources
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import BOTH, SIMPLE, WHOLE, ForwardContract, Logits, set_to, swap
from tests.families.llava_onevision import (
    MOST_TILES,
    PINPOINTS,
    SIDE,
    VIEW,
    Example,
    best_tiles,
    hf_inputs,
    make_example,
    our_batch,
    our_images,
    patches_of,
    tiny_llava,
)
from tests.families.pair import Pair, cut, make_pair
from tests.numerics import assert_close, error
from tests.sequences import unpack
from tests.torch_reductions import reduced

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PLAIN, PAPER, SMALL = Plan(), Reduction(), Reduction(attention_range=5, active_fraction=0.3)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_llava(0))


BATCHES = {
    "wide": [[3, (20, 33), 5]],
    "tall": [[3, (50, 17), 5]],
    "scaled down": [[4, (61, 47), 6]],
    "very wide": [[2, (9, 71), 3]],
    "two images with text between": [[4, (20, 33), 7, (40, 15), 9]],
    "ragged": [[3, (20, 33), 5], [2, (11, 14), 1, (30, 9), 3, (13, 13), 11], [13], [1, (61, 47), 6]],
    "image first": [[(9, 10), 4]],
}
"""Numbers of text tokens, and images by height and width in pixels."""


def examples_of(name: str) -> list[Example]:
    return [make_example(seed, parts) for seed, parts in enumerate(BATCHES[name], 1)]


@torch.no_grad()
def their_logits(pair: Pair, examples: list[Example]) -> list[np.ndarray]:
    return cut(pair.theirs(**hf_inputs(examples)).logits, examples)


@partial(jax.jit, static_argnames=("graph", "plan", "reduction", "new_tokens"))
def run_prefill(graph, state, batch, arrays, source, plan: Plan, reduction: Reduction, new_tokens: int):
    """Logits of all slots, were the probe scores numbers, and the cache."""
    model = nnx.merge(graph, state)
    tokens = model.vision(*arrays)
    x = model.decoder.embed(batch.text_ids, tokens.reshape(-1, tokens.shape[-1])[source])
    context = model.decoder.context(batch.layout, batch.rope_positions, KEY)
    x, record = model.decoder.prefill(x, context, plan, reduction)
    cache = model.decoder.make_cache(record, batch.layout, new_tokens)
    return model.decoder.logits(x), record.kept.scored.all(), cache


def start(
    model: VisionLanguageModel, examples: list[Example], plan: Plan = PLAIN, reduction: Reduction = PAPER, new_tokens: int = 0
):
    """Logits of all tokens, cache and batch."""
    spare = (2, 3)
    batch, images = our_batch(examples, spare), our_images(examples, spare[1])
    logits, scored, cache = run_prefill(*nnx.split(model), batch, images.arrays, images.source, plan, reduction, new_tokens)
    assert scored
    return unpack(logits, batch.layout), cache, batch


def our_logits(*arguments) -> list[np.ndarray]:
    return start(*arguments)[0]


def assert_all_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


def test_the_images_are_what_their_names_say():
    def tokens(name: str) -> list[int]:
        return [len(sources) for (sources, _) in examples_of(name)[0].placed]

    assert best_tiles((20, 33)) == (2, 3)
    assert best_tiles((50, 17)) == (4, 2)
    scaled, whole = tokens("scaled down")[0], best_tiles((61, 47))
    assert scaled < SIDE**2 * (whole[0] * whole[1])
    assert tokens("two images with text between") == [SIDE**2 + 1] * 2


@pytest.mark.parametrize("name", BATCHES)
def test_tower_and_connector(pair, name):
    examples = examples_of(name)
    inputs, images = hf_inputs(examples), our_images(examples)
    features = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    with torch.no_grad():
        theirs = pair.theirs.model.get_image_features(**features)
        views = torch.tensor(np.concatenate([v for e in examples for v in e.views]).astype(np.float32))
        tower = pair.theirs.model.vision_tower(views, output_hidden_states=True).hidden_states[-1]
    assert tower.std() > 1
    assert_close(jax.jit(pair.ours.vision.features)(patches_of(examples)), tower, SIMPLE)
    counts = [len(sources) for e in examples for sources, _ in e.placed]
    ours = jax.jit(pair.ours.vision)(*images.arrays)
    for row, count, expected in zip(ours, counts, theirs.pooler_output, strict=True):
        assert_close(row[:count], expected, SIMPLE)
        np.testing.assert_array_equal(row[count:], 0)


def test_logits_of_a_model_with_tied_head_and_one_kv_head(tmp_path):
    pair = make_pair(tmp_path, tiny_llava(3, tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-6))
    assert pair.config.decoder.tied_head
    examples = examples_of("ragged")
    assert_all_close(our_logits(pair.ours, examples), their_logits(pair, examples), WHOLE)


def _without_scaling(size: int, new_size: int):
    """Nearest instead of bilinear."""
    low = (np.arange(new_size) * size) // new_size
    return low, low, np.zeros(new_size, np.float32)


WRONG_GRIDS = {
    "unpadding of the other axis": (anyres, "unpadded", lambda grid, size: grid[1:-1]),
    "nearest instead of bilinear": (llava_onevision, "_interpolation", _without_scaling),
}


@pytest.mark.parametrize("name", WRONG_GRIDS)
def test_a_wrong_grid_misses_by_a_hundred_tolerances(pair, name, monkeypatch):
    """With as many visual tokens as there should be, so that only their values tell."""
    (example,) = examples_of("scaled down")
    monkeypatch.setattr(*WRONG_GRIDS[name])
    (wrong,) = examples_of("scaled down")
    count = len(example.placed[0][0])
    placed = [tuple(np.resize(array, (count, 4)) for array in wrong.placed[0])]
    (ours,) = our_logits(pair.ours, [replace(example, placed=placed)])
    (theirs,) = their_logits(pair, [example])
    assert error(ours, theirs) > 100 * WHOLE


def test_grids_of_every_size():
    """Sources and weights against Hugging Face's `pack_image_features` on a picture of coordinates."""
    from types import SimpleNamespace

    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    vision = SimpleNamespace(image_size=VIEW, patch_size=VIEW // SIDE)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS))
    rng = np.random.default_rng(0)
    scaled = 0
    for size in [tuple(map(int, rng.integers(4, 90, 2))) for _ in range(300)]:
        tiles = best_tiles(size)
        features = rng.standard_normal((1 + tiles[0] * tiles[1], SIDE**2, 2)).astype(np.float32)
        newline = np.array([7, 8], np.float32)
        (expected,), _ = LlavaOnevisionModel.pack_image_features(
            model, [torch.tensor(features)], torch.tensor([size]), torch.tensor(newline), f"anyres_max_{MOST_TILES}"
        )
        sources, weights = grid_sources(size, tiles, SIDE, MOST_TILES)
        scaled += bool((weights[:, 1:] > 0).any())
        table = np.concatenate([newline[None], features.reshape(-1, 2)])
        ours = (table[sources] * weights[:, :, None]).sum(1)
        assert_close(ours, expected[SIDE**2 :], 1e-6)
    assert 30 < scaled < 270


def step_inputs(batch, step: int, new_tokens: int):
    """Position and rotary position of the token number `step` after the prompts, and the room in the cache."""
    rope = batch.next_rope + step
    return batch.next_position + step, rope[:, None, :], jnp.int32(new_tokens - step)


@pytest.mark.parametrize("plan", [PLAIN, BOTH], ids=Plan.label)
def test_greedy_tokens_with_two_images(pair, plan):
    new_tokens = 40
    (example,) = examples_of("two images with text between")
    with reduced(pair.theirs, [torch.tensor(example.is_visual)], plan.attention, plan.ffn, 5, "0.3", "0.1"):
        generated = pair.theirs.generate(**hf_inputs([example]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    expected = generated[0, len(example.token_ids) :].tolist()
    assert len(expected) == new_tokens
    assert len(set(expected)) > 5
    (logits,), cache, batch = start(pair.ours, [example], plan, SMALL, new_tokens)
    tokens = [int(logits[-1].argmax())]
    decode = jax.jit(pair.ours.decoder.decode)
    for step in range(new_tokens - 1):
        row, cache = decode(jnp.asarray([tokens[-1:]], jnp.int32), cache, *step_inputs(batch, step, new_tokens))
        tokens.append(int(row[0, 0].argmax()))
    assert tokens == expected


def wrong_newline(model: VisionLanguageModel) -> None:
    model.vision.image_newline[...] = jnp.roll(model.vision.image_newline[...], 1)


def wrong_theta(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_theta=1e6)


class TestLlavaOnevision(ForwardContract):
    batches: ClassVar = BATCHES
    reduced: ClassVar = [("ragged", BOTH), ("two images with text between", BOTH)]
    mutations: ClassVar = {
        "dropped_query_bias": lambda model: set_to(model.decoder.layers.attention.q_proj.bias, 0),
        "dropped_tower_bias": lambda model: set_to(model.vision.tower.layers.fc1.bias, 0),
        "dropped_projector_bias": lambda model: set_to(model.vision.projector_fc1.bias, 0),
        "swapped_norms": lambda model: swap(model.decoder.layers.input_norm.scale, model.decoder.layers.ffn_norm.scale),
        "swapped_tower_norms": lambda model: swap(
            model.vision.tower.layers.attention_norm.scale, model.vision.tower.layers.mlp_norm.scale
        ),
        "wrong_newline": wrong_newline,
        "wrong_theta": wrong_theta,
    }
    mutated: ClassVar = "scaled down"

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return examples_of(batch)

    def ours(self, model: VisionLanguageModel, pair: Pair, examples: list[Example], plan: Plan, reduction: Reduction) -> Logits:
        return our_logits(model, examples, plan, reduction)

    def theirs(self, pair: Pair, examples: list[Example]) -> Logits:
        return their_logits(pair, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return Prompt.plain(example.token_ids, example.is_visual)

    def visual(self, pair: Pair, examples: list[Example]) -> list[np.ndarray]:
        images = our_images(examples)
        tokens = np.asarray(jax.jit(pair.ours.vision)(*images.arrays))
        tokens = tokens.reshape(-1, tokens.shape[-1])[images.source]
        return [row[: example.is_visual.sum()] for row, example in zip(tokens, examples, strict=True)]
