"""Parity with Hugging Face's Qwen2-VL in float32, through the real loader: parts, whole, reduced, decoding."""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.qwen2_vl.preparer import patch_places
from rlens_jax.models.decoder import as_data
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import SIMPLE, WHOLE, set_to, swap
from tests.families.pair import Pair, cut, make_pair
from tests.families.qwen2_vl import Example, hf_inputs, make_example, our_batch, our_images
from tests.families.qwen_contract import (
    KEY,
    NEW_TOKENS,
    QwenContract,
    assert_all_close,
    our_logits,
    split,
    start,
    step_inputs,
    their_logits,
    visual_of,
)
from tests.numerics import assert_close, error
from tests.sequences import pack
from tests.torch_reductions import reduced
from tests.torch_support import tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PLAIN, SMALL = Plan(), Reduction(attention_range=5, active_fraction=0.3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_qwen2_vl(0))


BATCHES = {
    "one image each": [[3, (6, 10), 5], [(2, 6), 4]],
    "two images with text between": [[4, (4, 14), 7, (8, 6), 9]],
    "500 tokens": [[103, (16, 26), 211, (22, 10), 37]],
    "ragged": [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13], [1, (12, 18), 6]],
}


def examples_of(name: str, config: Qwen2VLConfig) -> list[Example]:
    return [make_example(seed, parts, config) for seed, parts in enumerate(BATCHES[name], 1)]


@pytest.mark.parametrize("name", ["500 tokens", "ragged"])
def test_embeddings_and_each_layer(pair, name):
    """Every layer from Hugging Face's own states, so that an error shows in the layer that makes it."""
    examples = examples_of(name, pair.config)
    with torch.no_grad():
        states = pair.theirs(**hf_inputs(examples), output_hidden_states=True).hidden_states
    batch, images = our_batch(examples, pair.config), our_images(examples, pair.config)
    decoder = pair.ours.decoder
    embedded = pair.ours.decoder.embed(batch.text_ids, visual_of(pair.ours, images))
    assert_all_close(split(embedded, batch), cut(states[0], examples), SIMPLE)

    @jax.jit
    def one_layer(x, layer):
        context = decoder.context(batch.layout, batch.rope_positions, KEY)
        dense = as_data(Plan(), decoder.config.num_layers)
        return decoder.run_layers(x, context, dense, Reduction(), layer, layer + 1)[0]

    # Hugging Face's last states are normed: they belong to the logits.
    for layer in range(decoder.config.num_layers - 1):
        x = jnp.asarray(pack(cut(states[layer], examples), batch.layout))
        y = one_layer(x, jnp.int32(layer))
        assert_all_close(split(y, batch), cut(states[layer + 1], examples), SIMPLE)


def test_logits_of_a_model_with_tied_head_and_one_kv_head(tmp_path):
    pair = make_pair(tmp_path, tiny_qwen2_vl(3, tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-5))
    examples = examples_of("ragged", pair.config)
    assert_all_close(our_logits(pair.ours, pair.config, examples), their_logits(pair, examples), WHOLE)


PLANS = [Plan(attention=(1, 3, 4)), Plan(ffn=(0, 2)), Plan(attention=(0, 2, 3), ffn=(1, 2, 4))]


def test_a_wrong_order_of_patches_misses_by_a_hundred_tolerances(pair):
    (example,) = examples_of("two images with text between", pair.config)
    merge = pair.config.vision.merge_size

    def raster(patches, grid):
        places = patch_places(grid, merge)
        return patches[np.lexsort((places[:, 1], places[:, 0]))]

    wrong = replace(example, patches=[raster(p, g) for p, g in zip(example.patches, example.grids, strict=True)])
    (ours,), (theirs,) = our_logits(pair.ours, pair.config, [wrong]), their_logits(pair, [example])
    assert error(ours, theirs) > 100 * WHOLE


def test_rows_and_columns_exchanged_miss_by_a_hundred_tolerances(pair):
    (example,) = examples_of("two images with text between", pair.config)
    wrong = replace(example, grids=[grid[::-1] for grid in example.grids])
    (ours,), (theirs,) = our_logits(pair.ours, pair.config, [wrong]), their_logits(pair, [example])
    assert error(ours, theirs) > 100 * WHOLE


@pytest.mark.parametrize("plan", [PLAIN, PLANS[2]], ids=Plan.label)
def test_decoding_step_by_step(pair, plan):
    """The last text tokens one by one through the cache, against Hugging Face's pass over everything."""
    steps = 5
    examples = examples_of("ragged", pair.config)
    whole = [e for e in examples if not e.is_visual[-steps:].any()]
    assert len(whole) >= 3
    masks = [torch.tensor(example.is_visual) for example in whole]
    with reduced(pair.theirs, masks, plan.attention, plan.ffn, 5, "0.3", "0.1"):
        theirs = their_logits(pair, whole)
    prompts = [example.cut(len(example.token_ids) - steps) for example in whole]
    _, cache, batch = start(pair.ours, pair.config, prompts, plan, SMALL)
    decode = jax.jit(pair.ours.decoder.decode)
    for step in range(steps):
        newest = jnp.asarray([[example.token_ids[step - steps]] for example in whole])
        logits, cache = decode(newest, cache, *step_inputs(batch, step, NEW_TOKENS))
        for row, expected in zip(logits, theirs, strict=True):
            assert_close(row[0], expected[step - steps], WHOLE)


def dropped_key_bias_of_one_layer(model: VisionLanguageModel) -> None:
    bias = model.decoder.layers.attention.k_proj.bias
    bias[...] = bias[...].at[1].set(0)


def wrong_theta(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_theta=1e6)


def wrong_sections(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_sections=(2, 2, 1))


class TestQwen2VL(QwenContract):
    parts: ClassVar = BATCHES
    batches: ClassVar = BATCHES
    greedy: ClassVar = (PLAIN, PLANS[2])
    reduced: ClassVar = [*(("ragged", plan) for plan in PLANS), ("500 tokens", PLANS[2])]
    mutations: ClassVar = {
        "dropped_query_bias": lambda model: set_to(model.decoder.layers.attention.q_proj.bias, 0),
        "dropped_key_bias_of_one_layer": dropped_key_bias_of_one_layer,
        "dropped_vision_bias": lambda model: set_to(model.vision.layers.fc1.bias, 0),
        "dropped_merger_bias": lambda model: set_to(model.vision.merger_fc2.bias, 0),
        "swapped_norms": lambda model: swap(model.decoder.layers.input_norm.scale, model.decoder.layers.ffn_norm.scale),
        "swapped_vision_norms": lambda model: swap(model.vision.layers.attention_norm.scale, model.vision.layers.mlp_norm.scale),
        "swapped_gate_and_up": lambda model: swap(
            model.decoder.layers.ffn.gate_proj.kernel, model.decoder.layers.ffn.up_proj.kernel
        ),
        "wrong_theta": wrong_theta,
        "wrong_sections": wrong_sections,
    }
    mutated: ClassVar = "two images with text between"

    def test_logits_reduced_by_a_traced_plan(self, pair: Pair, batch: str, plan: Plan) -> None:
        examples = self.examples(pair, batch)
        traced = as_data(plan, pair.config.decoder.num_layers)
        ours = our_logits(pair.ours, pair.config, examples, traced, self.reduction)
        assert_all_close(ours, self.theirs_reduced(pair, examples, plan), WHOLE)
