"""Parity with Hugging Face's Qwen2-VL in float32, through the real loader: parts, whole, reduced, decoding."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.qwen2_vl.preparer import patch_places, rope_positions
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import SIMPLE, WHOLE, ForwardContract, Logits, set_to, swap
from tests.families.pair import Pair, cut, make_pair
from tests.families.qwen2_vl import Example, hf_inputs, make_example, our_batch, our_images, prompt_of
from tests.numerics import assert_close, error
from tests.sequences import pack, unpack
from tests.torch_reductions import reduced
from tests.torch_support import tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PLAIN, PAPER, SMALL = Plan(), Reduction(), Reduction(attention_range=5, active_fraction=0.3)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_qwen2_vl(0))


BATCHES = {
    "one image": [[3, (6, 10), 5]],
    "two images with text between": [[4, (4, 14), 7, (8, 6), 9]],
    "500 tokens": [[103, (16, 26), 211, (22, 10), 37]],
    "ragged": [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13], [1, (12, 18), 6]],
    "image first": [[(2, 6), 4]],
}


def examples_of(name: str, config: Qwen2VLConfig) -> list[Example]:
    return [make_example(seed, parts, config) for seed, parts in enumerate(BATCHES[name], 1)]


def split(packed, batch) -> list[np.ndarray]:
    return unpack(packed, batch.layout)


@torch.no_grad()
def their_logits(pair: Pair, examples: list[Example]) -> list[np.ndarray]:
    return cut(pair.theirs(**hf_inputs(examples)).logits, examples)


def embed(model: VisionLanguageModel, batch, tower_inputs, source):
    tokens = model.vision(*tower_inputs)
    return model.decoder.embed(batch.text_ids, tokens.reshape(-1, tokens.shape[-1])[source])


@partial(jax.jit, static_argnames=("graph", "plan", "reduction", "new_tokens"))
def run_prefill(graph, state, batch, tower_inputs, source, plan: Plan, reduction: Reduction, new_tokens: int = 0):
    """Logits of all slots, were the probe scores numbers, and the cache."""
    model = nnx.merge(graph, state)
    context = model.decoder.context(batch.layout, batch.rope_positions, KEY)
    x, record = model.decoder.prefill(embed(model, batch, tower_inputs, source), context, plan, reduction)
    cache = (model.decoder.make_cache(record, batch.layout, new_tokens),)
    return model.decoder.logits(x), record.kept.scored.all(), cache


@partial(jax.jit, static_argnames=("graph", "reduction"))
def run_traced(graph, state, batch, tower_inputs, source, plan: TracedPlan, reduction: Reduction):
    """Logits of all slots, and were the probe scores numbers."""
    model = nnx.merge(graph, state)
    context, stop = model.decoder.context(batch.layout, batch.rope_positions, KEY), plan.hollow.shape[0]
    x = embed(model, batch, tower_inputs, source)
    x, scored = model.decoder.run_layers(x, context, plan, reduction, jnp.int32(0), jnp.int32(stop))
    return model.decoder.logits(x), scored.all()


def start(
    model: VisionLanguageModel,
    config: Qwen2VLConfig,
    examples: list[Example],
    plan: Plan | TracedPlan = PLAIN,
    reduction: Reduction = PAPER,
    new_tokens: int = 0,
):
    """Logits of all tokens (by `prefill` for a static plan, `run_layers` for a traced one), cache and batch."""
    spare = (2, 3)
    batch, images = our_batch(examples, config, spare), our_images(examples, config, spare[1])
    arguments = (*nnx.split(model), batch, images.tower_inputs, images.source, plan, reduction)
    if isinstance(plan, Plan):
        logits, scored, cache = run_prefill(*arguments, new_tokens)
    else:
        (logits, scored), cache = run_traced(*arguments), None
    assert scored
    return split(logits, batch), cache, batch


def our_logits(*arguments) -> list[np.ndarray]:
    return start(*arguments)[0]


def assert_all_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("name", BATCHES)
def test_vision_tower_and_merger(pair, name):
    examples = examples_of(name, pair.config)
    inputs, images = hf_inputs(examples), our_images(examples, pair.config)
    with torch.no_grad():
        theirs = pair.theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    features = jax.jit(pair.ours.vision.features)(*images.tower_inputs)
    merged = jax.jit(pair.ours.vision)(*images.tower_inputs)
    group, counts = pair.config.vision.merge_size**2, images.num_patches.tolist()
    assert_close(np.concatenate([row[:n] for row, n in zip(features, counts, strict=True)]), theirs.last_hidden_state, SIMPLE)
    assert_close(np.concatenate([row[: n // group] for row, n in zip(merged, counts, strict=True)]), theirs.pooler_output, SIMPLE)


@pytest.mark.parametrize("name", BATCHES)
def test_rotary_positions(pair, name):
    examples = examples_of(name, pair.config)
    inputs = hf_inputs(examples)
    theirs, deltas = pair.theirs.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], None, inputs["attention_mask"]
    )
    for row, example in enumerate(examples):
        positions, following = rope_positions(example.is_visual, example.grids, pair.config.vision.merge_size)
        length = len(example.token_ids)
        np.testing.assert_array_equal(positions, theirs[:, row, :length])
        assert following == length + int(deltas[row])


@pytest.mark.parametrize("name", ["two images with text between", "500 tokens", "ragged"])
def test_embeddings_and_each_layer(pair, name):
    """Every layer from Hugging Face's own states, so that an error shows in the layer that makes it."""
    examples = examples_of(name, pair.config)
    with torch.no_grad():
        states = pair.theirs(**hf_inputs(examples), output_hidden_states=True).hidden_states
    batch, images = our_batch(examples, pair.config), our_images(examples, pair.config)
    decoder = pair.ours.decoder
    embedded = jax.jit(lambda: embed(pair.ours, batch, images.tower_inputs, images.source))()
    assert_all_close(split(embedded, batch), cut(states[0], examples), SIMPLE)

    @jax.jit
    def one_layer(x, layer):
        context = decoder.context(batch.layout, batch.rope_positions, KEY)
        flags = jnp.zeros(decoder.config.num_layers, bool)
        return decoder.run_layers(x, context, TracedPlan(flags, flags), Reduction(), layer, layer + 1)[0]

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


def step_inputs(batch, step: int, new_tokens: int):
    """Position and rotary position of the token number `step` after the prompts, and the room in the cache."""
    rope = batch.next_rope + step
    return (batch.next_position + step, jnp.stack([rope] * batch.rope_positions.shape[1], axis=1), jnp.int32(new_tokens - step))


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
    _, cache, batch = start(pair.ours, pair.config, prompts, plan, SMALL, steps)
    decode = jax.jit(pair.ours.decoder.decode)
    for step in range(steps):
        newest = jnp.asarray([[example.token_ids[step - steps]] for example in whole])
        logits, cache = decode(newest, cache, *step_inputs(batch, step, steps))
        for row, expected in zip(logits, theirs, strict=True):
            assert_close(row[0], expected[step - steps], WHOLE)


@pytest.mark.parametrize("plan", [PLAIN, PLANS[2]], ids=Plan.label)
def test_greedy_tokens(pair, plan):
    new_tokens = 40
    (example,) = examples_of("two images with text between", pair.config)
    with reduced(pair.theirs, [torch.tensor(example.is_visual)], plan.attention, plan.ffn, 5, "0.3", "0.1"):
        generated = pair.theirs.generate(**hf_inputs([example]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    expected = generated[0, len(example.token_ids) :].tolist()
    assert len(expected) == new_tokens
    assert len(set(expected)) > 5
    (logits,), cache, batch = start(pair.ours, pair.config, [example], plan, SMALL, new_tokens)
    tokens = [int(logits[-1].argmax())]
    decode = jax.jit(pair.ours.decoder.decode)
    for step in range(new_tokens - 1):
        row, cache = decode(jnp.asarray([tokens[-1:]], jnp.int32), cache, *step_inputs(batch, step, new_tokens))
        tokens.append(int(row[0, 0].argmax()))
    assert tokens == expected


def dropped_key_bias_of_one_layer(model: VisionLanguageModel) -> None:
    bias = model.decoder.layers.attention.k_proj.bias
    bias[...] = bias[...].at[1].set(0)


def wrong_theta(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_theta=1e6)


def wrong_sections(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_sections=(2, 2, 1))


class TestQwen2VL(ForwardContract):
    batches: ClassVar = BATCHES
    reduced: ClassVar = [
        *(("ragged", plan) for plan in PLANS),
        ("two images with text between", PLANS[2]),
        ("500 tokens", PLANS[2]),
    ]
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

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return examples_of(batch, pair.config)

    def ours(self, model: VisionLanguageModel, pair: Pair, examples: list[Example], plan: Plan, reduction: Reduction) -> Logits:
        return our_logits(model, pair.config, examples, plan, reduction)

    def theirs(self, pair: Pair, examples: list[Example]) -> Logits:
        return their_logits(pair, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return prompt_of(example, pair.config)

    def visual(self, pair: Pair, examples: list[Example]) -> list[np.ndarray]:
        images = our_images(examples, pair.config)
        tokens = np.asarray(jax.jit(pair.ours.vision)(*images.tower_inputs))
        tokens = tokens.reshape(-1, tokens.shape[-1])[images.source]
        return [row[: example.is_visual.sum()] for row, example in zip(tokens, examples, strict=True)]

    def test_logits_reduced_by_a_traced_plan(self, pair: Pair, batch: str, plan: Plan) -> None:
        examples = self.examples(pair, batch)
        traced = TracedPlan(*map(jnp.asarray, plan.flags(pair.config.decoder.num_layers)))
        ours = our_logits(pair.ours, pair.config, examples, traced, self.reduction)
        assert_all_close(ours, self.theirs_reduced(pair, examples, plan), WHOLE)
