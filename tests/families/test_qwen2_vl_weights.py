"""The Qwen2-VL table against published names and shapes, and against a PyTorch model in every spelling."""

import json
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.published import save_hf
from tests.checkpoints.tiny import assert_same
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.placement import Placement
from tests.torch_support import save_tiny, tiny_qwen2_vl

pytestmark = pytest.mark.torch

SPELLINGS = {"published": {}, "in memory": {"save_original_format": False}, "sharded": {"max_shard_size": "200KB"}}


def published_shapes(sizes: dict) -> dict[str, list[int]]:
    """Names and shapes of the published files, by rule."""
    shapes = published_files.qwen_decoder_shapes(sizes) | {
        "visual.patch_embed.proj.weight": [1280, 3, 2, 14, 14],
        "visual.merger.ln_q.weight": [1280],
        "visual.merger.ln_q.bias": [1280],
        "visual.merger.mlp.0.weight": [5120, 5120],
        "visual.merger.mlp.0.bias": [5120],
        "visual.merger.mlp.2.weight": [sizes["D"], 5120],
        "visual.merger.mlp.2.bias": [sizes["D"]],
    }
    for layer in range(32):
        for module, rows, columns in (
            ("attn.qkv", 3840, 1280),
            ("attn.proj", 1280, 1280),
            ("mlp.fc1", 5120, 1280),
            ("mlp.fc2", 1280, 5120),
        ):
            shapes[f"visual.blocks.{layer}.{module}.weight"] = [rows, columns]
            shapes[f"visual.blocks.{layer}.{module}.bias"] = [rows]
        for module in ("norm1", "norm2"):
            shapes[f"visual.blocks.{layer}.{module}.weight"] = [1280]
            shapes[f"visual.blocks.{layer}.{module}.bias"] = [1280]
    return shapes


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return tiny_qwen2_vl(1)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)


class TestQwen2VLWeights(WeightsContract):
    facts: ClassVar = {
        name: PublishedFacts(published_files.qwen2_vl(sizes), published_shapes(sizes), sizes["numbers"], name, whole=False)
        for name, sizes in published_files.QWEN2_VL_SIZES.items()
    }

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        placed.check_decoder(reference.model.language_model, reference.lm_head, num_heads=6)
        vision = reference.model.visual
        placed.check("vision.patch_embed.kernel", vision.patch_embed.proj.weight.reshape(24, -1).T)
        placed.check_norm("vision.merger_norm", vision.merger.ln_q)
        placed.check_linear("vision.merger_fc1", vision.merger.mlp[0])
        placed.check_linear("vision.merger_fc2", vision.merger.mlp[2])
        for i, block in enumerate(vision.blocks):
            at = "vision.layers."
            for j, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(j * 24, (j + 1) * 24)
                placed.check(f"{at}{part}.kernel", block.attn.qkv.weight[rows].T.reshape(24, 3, 8), i)
                placed.check(f"{at}{part}.bias", block.attn.qkv.bias[rows].reshape(3, 8), i)
            placed.check_mixed(at + "o_proj", block.attn.proj, i)
            placed.check_linear(at + "fc1", block.mlp.fc1, i)
            placed.check_linear(at + "fc2", block.mlp.fc2, i)
            placed.check_norm(at + "attention_norm", block.norm1, i)
            placed.check_norm(at + "mlp_norm", block.norm2, i)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_model(reference, published, spelling, tmp_path):
    folder = save_tiny(tmp_path / "model", reference, **SPELLINGS[spelling])
    if spelling == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


def test_shards_without_an_index_are_read(reference, published, tmp_path):
    folder = save_tiny(tmp_path / "model", reference, max_shard_size="200KB")
    (folder / "model.safetensors.index.json").unlink()
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


def test_bfloat16_comes_and_goes_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    reference = tiny_qwen2_vl(2, num_hidden_layers=2, tie_word_embeddings=True).to(torch.bfloat16)
    folder = save_tiny(tmp_path / "model", reference)
    kind, model = load_model(folder, jnp.bfloat16)
    assert kind.config.decoder.tied_head
    save_hf(tmp_path / "back", model, kind.fields)
    before, after = (load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    assert "lm_head.weight" not in after
    before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rounding_to_bfloat16_is_to_nearest(reference, published):
    model = load_model(published, jnp.bfloat16)[1]
    expected = reference.lm_head.weight.detach().to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(np.asarray(model.decoder.head[...]).view(np.int16), expected)


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_loads_what_we_write(reference, published, shard_bytes, tmp_path):
    from transformers import Qwen2VLForConditionalGeneration

    kind, model = load_model(published, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 4
    back, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = reference.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
