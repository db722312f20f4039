"""InternVL against Hugging Face's, both loaded from the same files by the real loader: parts, whole, reduced, decoding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.families.internvl.model import InternVLConfig
from rlens_jax.models.decoder import as_data
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import BOTH, SIMPLE, WHOLE, ForwardContract, Logits, set_to, swap
from tests.families.internvl import SIX_B, Example, hf_inputs, make_example, our_batch, our_images, save_native, tiny_internvl
from tests.families.pair import Pair, cut, make_pair
from tests.numerics import assert_close, error
from tests.sequences import unpack
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow]

PLAIN, PAPER, SMALL = Plan(), Reduction(), Reduction(attention_range=5, active_fraction=0.3)
KEY = jax.random.key(0)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
"""Plain RoPE for prompts as short as here."""
PAIRS = {
    "hf": (save_tiny, {"seed": 0}),
    "hf, 6B tower": (save_tiny, {"seed": 1, "vision": SIX_B}),
    "hf, Llama": (save_tiny, {"seed": 2, "text_model": "llama", "rope_parameters": DYNAMIC}),
    "hf, tied": (save_tiny, {"seed": 3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "native, Qwen2": (save_native, {"seed": 4}),
    "native, InternLM2": (save_native, {"seed": 5, "text_model": "llama"}),
    "native, 6B tower": (save_native, {"seed": 6, "vision": SIX_B}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            save, options = PAIRS[name]
            made[name] = make_pair(tmp_path_factory.mktemp("tiny"), tiny_internvl(**options), save)
        return made[name]

    return get


@pytest.fixture(scope="module")
def pair(pairs) -> Pair:
    return pairs("hf")


BATCHES = {
    "two images with text between": [[4, (60, 21), 7, (14, 37), 9]],
    "ragged": [[3, (40, 90), 5], [2, (9, 8), 1, (50, 20), 3, (16, 16), 11], [13], [1, (45, 30), 6]],
    "image first": [[(30, 16), 4]],
}


def examples_of(name: str) -> list[Example]:
    return [make_example(seed, parts) for seed, parts in enumerate(BATCHES[name], 1)]


@torch.no_grad()
def their_logits(pair: Pair, examples: list[Example]) -> list[np.ndarray]:
    return cut(pair.theirs(**hf_inputs(examples)).logits, examples)


@jax.jit
def visual_tokens(graph_state, patches, source):
    tokens = nnx.merge(*graph_state).vision(patches)
    return tokens.reshape(-1, tokens.shape[-1])[source]


def gather(model: VisionLanguageModel, patches, source):
    tokens = model.vision(patches)
    return tokens.reshape(-1, tokens.shape[-1])[source]


@partial(jax.jit, static_argnames=("graph", "plan", "reduction"))
def run_prefill(graph, state, batch, patches, source, plan: Plan, reduction: Reduction):
    """Logits of all slots, and were the probe scores numbers."""
    model = nnx.merge(graph, state)
    context = model.decoder.context(batch.layout, batch.rope_positions, KEY)
    x = model.decoder.embed(batch.text_ids, gather(model, patches, source))
    x, record = model.decoder.prefill(x, context, plan, reduction)
    return model.decoder.logits(x), record.kept.scored.all()


def our_logits(
    model: VisionLanguageModel, config: InternVLConfig, examples: list[Example], plan=PLAIN, reduction=PAPER
) -> list[np.ndarray]:
    spare = (2, 3)
    batch, (patches, source) = our_batch(examples, spare), our_images(examples, config, spare[1])
    logits, scored = run_prefill(*nnx.split(model), batch, patches, source, plan, reduction)
    assert scored
    return unpack(logits, batch.layout)


def assert_all_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("name", ["hf", "hf, 6B tower", "native, Qwen2", "native, 6B tower"])
def test_vision_tower_and_connector(pairs, name):
    pair, examples = pairs(name), examples_of("ragged")
    patches, _ = our_images(examples, pair.config)
    tiles = [tiles for example in examples for tiles in example.tiles]
    assert sorted(map(len, tiles)) == [1, 1, 3, 4, 7]
    with torch.no_grad():
        theirs = pair.theirs.model.get_image_features(torch.tensor(np.concatenate(tiles)), return_dict=True)
    features = jax.jit(jax.vmap(pair.ours.vision.features))(patches)
    tokens = jax.jit(pair.ours.vision)(patches)
    assert np.abs(theirs.last_hidden_state.numpy()).std() > 0.3
    assert_close(
        np.concatenate([row[: len(own)] for row, own in zip(features, tiles, strict=True)]), theirs.last_hidden_state, SIMPLE
    )
    per_tile = pair.config.vision.tile_tokens
    rows = [row[: len(own) * per_tile] for row, own in zip(tokens, tiles, strict=True)]
    assert_close(np.concatenate(rows).reshape(theirs.pooler_output.shape), theirs.pooler_output, SIMPLE)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "hf"])
def test_logits_of_other_variants(pairs, name):
    pair, examples = pairs(name), examples_of("ragged")
    theirs = their_logits(pair, examples)
    assert min(logits.std() for logits in theirs) >= 1
    assert_all_close(our_logits(pair.ours, pair.config, examples), theirs, WHOLE)


def test_both_layouts_are_one_model(pair, tmp_path):
    """Bit-equal tokens: the layouts differ in names and fusing only."""
    save_native(tmp_path / "native", pair.theirs)
    kind, native = load_model(tmp_path / "native", jnp.float32)
    examples = examples_of("two images with text between")
    ours = our_logits(pair.ours, pair.config, examples)
    np.testing.assert_array_equal(our_logits(native, kind.config, examples)[0], ours[0])


def test_transposed_tokens_of_the_first_pixel_shuffle(pairs, tmp_path, monkeypatch):
    theirs = tiny_internvl(7)
    shuffle = theirs.model.pixel_shuffle
    monkeypatch.setattr(theirs.model, "pixel_shuffle", lambda *args, **named: shuffle(*args, **named).permute(0, 2, 1, 3))
    save_native(tmp_path / "model", theirs, ps_version="v1")
    kind, ours = load_model(tmp_path / "model", jnp.float32)
    pair = Pair(theirs, kind.config, ours)
    examples = examples_of("two images with text between")
    (expected,) = their_logits(pair, examples)
    (transposed,) = our_logits(ours, kind.config, examples)
    assert_close(transposed, expected, WHOLE)
    ours.vision.config = replace(ours.vision.config, transposed=False)
    (wrong,) = our_logits(ours, kind.config, examples)
    assert error(wrong, expected) > 100 * WHOLE


def test_a_traced_plan_is_the_same_plan(pair):
    plan, examples = BOTH, examples_of("ragged")
    batch, (patches, source) = our_batch(examples), our_images(examples, pair.config)
    traced = as_data(plan, pair.config.decoder.num_layers)

    @jax.jit
    def run(traced):
        decoder = pair.ours.decoder
        context = decoder.context(batch.layout, batch.rope_positions, KEY)
        x = decoder.embed(batch.text_ids, gather(pair.ours, patches, source))
        return decoder.logits(decoder.run_layers(x, context, traced, SMALL, jnp.int32(0), jnp.int32(5))[0])

    static = our_logits(pair.ours, pair.config, examples, plan, SMALL)
    assert_all_close(unpack(run(traced), batch.layout), static, WHOLE)


@pytest.mark.parametrize(("name", "seed"), [("native, Qwen2", 3), ("native, InternLM2", 2)])
def test_greedy_tokens(pairs, name, seed):
    """The seeds are those whose answers do not only repeat a few tokens."""
    pair, new_tokens = pairs(name), 40
    examples = [make_example(seed, BATCHES["two images with text between"][0])]
    generated = pair.theirs.generate(**hf_inputs(examples), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    # Newer versions hand out the prompt as well.
    expected = generated[0, -new_tokens:].tolist()
    assert len(set(expected)) > 5
    batch, (patches, source) = our_batch(examples), our_images(examples, pair.config)

    @jax.jit
    def run(model):
        visual = gather(model, patches, source)
        first, cache, _ = prefill(model.decoder, visual, batch, PLAIN, PAPER, new_tokens, KEY)
        return decode(model.decoder, first, cache, batch, new_tokens, stop_tokens=())[0]

    assert run(pair.ours)[0, 0].tolist() == expected


def test_several_end_tokens(pairs):
    pair, new_tokens = pairs("native, Qwen2"), 40
    examples = [make_example(3, BATCHES["two images with text between"][0])]
    with torch.no_grad():
        generate = partial(pair.theirs.generate, **hf_inputs(examples), max_new_tokens=new_tokens, do_sample=False)
        endless = generate(eos_token_id=None)[0, -new_tokens:].tolist()
        early, late = sorted({token: place for place, token in reversed(list(enumerate(endless)))}.items(), key=itemgetter(1))[
            3:5
        ]
        stops = (late[0], early[0])
        theirs = generate(eos_token_id=list(stops), pad_token_id=0)[0].tolist()
    expected = endless[: early[1] + 1]
    assert theirs[-len(expected) :] == expected and len(expected) > 3
    batch, (patches, source) = our_batch(examples), our_images(examples, pair.config)

    @jax.jit
    def run(model):
        first, cache, _ = prefill(model.decoder, gather(model, patches, source), batch, PLAIN, PAPER, new_tokens, KEY)
        return decode(model.decoder, first, cache, batch, new_tokens, stops)

    tokens, finite = run(pair.ours)
    assert tokens[0, 0, : len(expected)].tolist() == expected
    assert set(tokens[0, 0, len(expected) :].tolist()) <= set(stops)
    assert finite.all()


def transposed_tokens(model: VisionLanguageModel) -> None:
    model.vision.config = replace(model.vision.config, transposed=True)


def columns_before_rows_in_the_pixel_shuffle(model: VisionLanguageModel) -> None:
    norm, fc1 = model.vision.connector_norm, model.vision.connector_fc1
    for parameter in (norm.scale, norm.bias, fc1.kernel):
        value = parameter[...]
        by_place = value.reshape(2, 2, -1, *value.shape[1:])
        parameter[...] = by_place.swapaxes(0, 1).reshape(value.shape)


class InternVLContract(ForwardContract):
    """Examples and passes of InternVL of any text model."""

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return examples_of(batch)

    def ours(self, model: VisionLanguageModel, pair: Pair, examples: list[Example], plan: Plan, reduction: Reduction) -> Logits:
        return our_logits(model, pair.config, examples, plan, reduction)

    def theirs(self, pair: Pair, examples: list[Example]) -> Logits:
        return their_logits(pair, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return Prompt.plain(example.token_ids, example.is_visual)

    def visual(self, pair: Pair, examples: list[Example]) -> list[np.ndarray]:
        tokens = np.asarray(visual_tokens(nnx.split(pair.ours), *our_images(examples, pair.config)))
        return [row[: example.is_visual.sum()] for row, example in zip(tokens, examples, strict=True)]


class TestInternVL(InternVLContract):
    batches: ClassVar = BATCHES
    reduced: ClassVar = [("two images with text between", BOTH), ("ragged", BOTH)]
    mutations: ClassVar = {
        "dropped_query_bias": lambda model: set_to(model.decoder.layers.attention.q_proj.bias, 0),
        "dropped_patch_bias": lambda model: set_to(model.vision.patch_embed.bias, 0),
        "dropped_vision_query_bias": lambda model: set_to(model.vision.layers.q_proj.bias, 0),
        "dropped_connector_bias": lambda model: set_to(model.vision.connector_fc2.bias, 0),
        "missing_layer_scale_of_attention": lambda model: set_to(model.vision.layers.attention_scale, 1),
        "missing_layer_scale_of_mlp": lambda model: set_to(model.vision.layers.mlp_scale, 1),
        "dropped_class_token": lambda model: set_to(model.vision.class_token, 0),
        "dropped_positions": lambda model: set_to(model.vision.position, 0),
        "swapped_norms": lambda model: swap(model.decoder.layers.input_norm.scale, model.decoder.layers.ffn_norm.scale),
        "swapped_vision_norms": lambda model: swap(model.vision.layers.attention_norm.scale, model.vision.layers.mlp_norm.scale),
        "transposed_tokens": transposed_tokens,
        "columns_before_rows_in_the_pixel_shuffle": columns_before_rows_in_the_pixel_shuffle,
    }
    mutated: ClassVar = "two images with text between"
