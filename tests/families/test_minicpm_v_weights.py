"""The MiniCPM-V 2.6 table against published names and shapes, and against a PyTorch model in the published layout."""

from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from tests.checkpoints.tiny import assert_same
from tests.families import minicpm_v
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.placement import Placement

pytestmark = pytest.mark.torch

PUBLISHED_BYTES = 16198350304
"""Of 789 bfloat16 tensors."""


def published_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published file, by rule."""
    width, kv, ffn, tower, tower_ffn = 3584, 512, 18944, 1152, 4304
    shapes = {
        "llm.model.embed_tokens.weight": [151666, width],
        "llm.model.norm.weight": [width],
        "llm.lm_head.weight": [151666, width],
        "vpm.embeddings.patch_embedding.weight": [tower, 3, 14, 14],
        "vpm.embeddings.patch_embedding.bias": [tower],
        "vpm.embeddings.position_embedding.weight": [4900, tower],
        "resampler.query": [64, width],
        "resampler.proj": [width, width],
        "resampler.kv_proj.weight": [width, tower],
        "resampler.attn.in_proj_weight": [3 * width, width],
        "resampler.attn.in_proj_bias": [3 * width],
        "resampler.attn.out_proj.weight": [width, width],
        "resampler.attn.out_proj.bias": [width],
    }

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [size]

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [rows, columns], [rows]

    for name in ("ln_q", "ln_kv", "ln_post"):
        norm(f"resampler.{name}", width)
    norm("vpm.post_layernorm", tower)
    for layer in range(27):
        at = f"vpm.encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}self_attn.{name}", tower, tower)
        linear(at + "mlp.fc1", tower_ffn, tower)
        linear(at + "mlp.fc2", tower, tower_ffn)
        norm(at + "layer_norm1", tower)
        norm(at + "layer_norm2", tower)
    for layer in range(28):
        at = f"llm.model.layers.{layer}."
        for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{at}self_attn.{name}", rows, width)
        shapes[at + "self_attn.o_proj.weight"] = [width, width]
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = [ffn, width]
        shapes[at + "mlp.down_proj.weight"] = [width, ffn]
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = [width]
    assert len(shapes) == 789
    return shapes


@pytest.fixture(scope="module")
def reference() -> minicpm_v.MiniCPMV:
    return minicpm_v.MiniCPMV(seed=1)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return reference.save(tmp_path_factory.mktemp("published") / "model")


class TestMiniCPMVWeights(WeightsContract):
    facts: ClassVar = {
        "2.6": PublishedFacts(published_files.MINICPM_V, published_shapes(), PUBLISHED_BYTES // 2, "minicpm-v-2_6")
    }

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        placed.check_decoder(reference.llm.model, reference.llm.lm_head, num_heads=8)
        placed.check_siglip("vision.tower.", reference.vpm)
        placed.check_norm("vision.post_norm", reference.vpm.post_layernorm)
        at, resampler = "vision.resampler.", reference.resampler
        placed.check(at + "query", resampler.query)
        placed.check(at + "kv_proj.kernel", resampler.kv_proj.weight.T)
        placed.check_norm(at + "query_norm", resampler.ln_q)
        placed.check_norm(at + "kv_norm", resampler.ln_kv)
        placed.check_norm(at + "post_norm", resampler.ln_post)
        for j, part in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(j * 256, (j + 1) * 256)
            placed.check(f"{at}{part}.kernel", resampler.attn.in_proj_weight[rows].T.reshape(256, 2, 128))
            placed.check(f"{at}{part}.bias", resampler.attn.in_proj_bias[rows].reshape(2, 128))
        placed.check(at + "o_proj.kernel", resampler.attn.out_proj.weight.T.reshape(2, 128, 256))
        placed.check(at + "o_proj.bias", resampler.attn.out_proj.bias)
        placed.check(at + "proj.kernel", resampler.proj)


def test_bfloat16_comes_and_goes_bit_for_bit(tmp_path):
    reference = minicpm_v.MiniCPMV(seed=2, num_hidden_layers=2, tie_word_embeddings=True).to(torch.bfloat16)
    folder = reference.save(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=True)
    kind, model = load_model(folder, jnp.bfloat16)
    assert kind.config.decoder.tied_head
    save_hf(tmp_path / "back", model, kind.fields)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    assert_same(load_model(tmp_path / "back", jnp.bfloat16)[1], model)


def test_what_is_not_needed_is_ignored_and_what_is_missing_is_told(reference, published, tmp_path):
    folder = reference.save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["resampler.pos_embed"] = torch.zeros(70, 70, 256)
    tensors["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])
    del tensors["resampler.attn.in_proj_bias"]
    tensors["resampler.attn.in_bias"] = torch.zeros(768)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="2 problems") as caught:
        load_model(folder, jnp.float32)
    assert "resampler.attn.in_bias: not known (did you mean 'resampler.attn.in_proj_bias'?)" in str(caught.value)
    assert "resampler.attn.in_proj_bias: missing, expected with shape [768]" in str(caught.value)
