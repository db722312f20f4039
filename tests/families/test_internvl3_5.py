"""InternVL3.5, whose text model is a Qwen3, against Hugging Face's: whole, reduced, with branches, decoding."""

from typing import ClassVar

import jax
import numpy as np
import pytest
import torch

from rlens_jax.commands.options import RunParser
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import decode, prefill
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import BOTH, set_to, swap
from tests.families.internvl import hf_inputs, make_example, our_batch, our_images, save_native, tiny_internvl
from tests.families.pair import Pair, make_pair
from tests.families.test_internvl import (
    BATCHES,
    KEY,
    InternVLContract,
    columns_before_rows_in_the_pixel_shuffle,
    gather,
    transposed_tokens,
)

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """In the native layout, which has the parameters of the other one bit for bit (test_internvl_weights.py)."""
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_internvl(9, "qwen3"), save_native)


def query_heads_in_another_order(model: VisionLanguageModel) -> None:
    kernel = model.decoder.layers.attention.q_proj.kernel
    kernel[...] = kernel[...][:, :, ::-1]


class TestInternVL35(InternVLContract):
    batches: ClassVar = {name: BATCHES[name] for name in ("two images with text between", "ragged")}
    reduced: ClassVar = [("ragged", BOTH)]
    mutations: ClassVar = {
        "dropped_norm_of_queries": lambda model: set_to(model.decoder.layers.attention.q_norm.scale, 1),
        "dropped_norm_of_keys": lambda model: set_to(model.decoder.layers.attention.k_norm.scale, 1),
        "swapped_norms_of_queries_and_keys": lambda model: swap(
            model.decoder.layers.attention.q_norm.scale, model.decoder.layers.attention.k_norm.scale
        ),
        "swapped_norms": lambda model: swap(model.decoder.layers.input_norm.scale, model.decoder.layers.ffn_norm.scale),
        "query_heads_in_another_order": query_heads_in_another_order,
        "exchanged_head_and_embedding": lambda model: swap(model.decoder.head, model.decoder.embedding),
        "dropped_positions": lambda model: set_to(model.vision.position, 0),
        "missing_layer_scale_of_attention": lambda model: set_to(model.vision.layers.attention_scale, 1),
        "dropped_connector_bias": lambda model: set_to(model.vision.connector_fc2.bias, 0),
        "transposed_tokens": transposed_tokens,
        "columns_before_rows_in_the_pixel_shuffle": columns_before_rows_in_the_pixel_shuffle,
    }
    mutated: ClassVar = "two images with text between"


def test_the_preset_reads():
    _, config = RunParser("rank", "", "").parse_run(["--config=internvl3_5_8b"])
    assert config.model == "checkpoints/internvl3_5_8b"


def test_greedy_tokens(pair):
    """The seed is one whose answer does not only repeat a few tokens."""
    examples, new_tokens = [make_example(3, BATCHES["two images with text between"][0])], 36
    with torch.no_grad():
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
        expected = pair.theirs.generate(**hf_inputs(examples), **options)[0, -new_tokens:].tolist()
    assert len(set(expected)) > 5
    batch, (patches, source) = our_batch(examples), our_images(examples, pair.config)

    @jax.jit
    def run(model):
        first, cache, _ = prefill(model.decoder, gather(model, patches, source), batch, Plan(), Reduction(), new_tokens, KEY)
        return decode(model.decoder, first, cache, batch, new_tokens, stop_tokens=())[0]

    assert np.asarray(run(pair.ours))[0, 0].tolist() == expected
