"""The Qwen2.5-VL table against published names and shapes, and against a PyTorch model in every spelling."""

from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.published import save_hf
from tests.checkpoints.tiny import assert_same
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.placement import Placement
from tests.families.qwen2_5_vl import tiny_qwen2_5_vl
from tests.torch_support import save_tiny

pytestmark = pytest.mark.torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def published_shapes(sizes: dict) -> dict[str, list[int]]:
    """Names and shapes of the published files, by rule."""
    shapes = published_files.qwen_decoder_shapes(sizes) | {
        "visual.patch_embed.proj.weight": [1280, 3, 2, 14, 14],
        "visual.merger.ln_q.weight": [1280],
        "visual.merger.mlp.0.weight": [5120, 5120],
        "visual.merger.mlp.0.bias": [5120],
        "visual.merger.mlp.2.weight": [sizes["D"], 5120],
        "visual.merger.mlp.2.bias": [sizes["D"]],
    }
    linear = {"attn.qkv": (3840, 1280), "attn.proj": (1280, 1280), "mlp.gate_proj": (3420, 1280)}
    linear |= {"mlp.up_proj": (3420, 1280), "mlp.down_proj": (1280, 3420)}
    for layer in range(32):
        for module, shape in linear.items():
            shapes[f"visual.blocks.{layer}.{module}.weight"] = list(shape)
            shapes[f"visual.blocks.{layer}.{module}.bias"] = [shape[0]]
        for module in ("norm1", "norm2"):
            shapes[f"visual.blocks.{layer}.{module}.weight"] = [1280]
    return shapes


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return tiny_qwen2_5_vl(1)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)


class TestQwen25VLWeights(WeightsContract):
    facts: ClassVar = {
        name: PublishedFacts(published_files.qwen2_5_vl(sizes), published_shapes(sizes), sizes["numbers"], name)
        for name, sizes in published_files.QWEN2_5_VL_SIZES.items()
    }

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        placed.check_decoder(reference.model.language_model, reference.lm_head, num_heads=6)
        vision = reference.model.visual
        placed.check("vision.patch_embed.kernel", vision.patch_embed.proj.weight.reshape(24, -1).T)
        placed.check("vision.merger_norm.scale", vision.merger.ln_q.weight)
        placed.check_linear("vision.merger_fc1", vision.merger.mlp[0])
        placed.check_linear("vision.merger_fc2", vision.merger.mlp[2])
        for i, block in enumerate(vision.blocks):
            at = "vision.layers."
            for j, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(j * 24, (j + 1) * 24)
                placed.check(f"{at}{part}.kernel", block.attn.qkv.weight[rows].T.reshape(24, 3, 8), i)
                placed.check(f"{at}{part}.bias", block.attn.qkv.bias[rows].reshape(3, 8), i)
            placed.check_mixed(at + "o_proj", block.attn.proj, i)
            placed.check_linear(at + "gate", block.mlp.gate_proj, i)
            placed.check_linear(at + "fc1", block.mlp.up_proj, i)
            placed.check_linear(at + "fc2", block.mlp.down_proj, i)
            placed.check(at + "attention_norm.scale", block.norm1.weight, i)
            placed.check(at + "mlp_norm.scale", block.norm2.weight, i)


def test_the_newer_spelling_gives_the_same_model(reference, published, tmp_path) -> None:
    folder = save_tiny(tmp_path / "model", reference, save_original_format=False)
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_and_back_is_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Of a tied head too, whose file has none."""
    from safetensors.torch import load_file

    reference = tiny_qwen2_5_vl(2, num_hidden_layers=2, tie_word_embeddings=dtype == "bfloat16").to(DTYPES[dtype])
    folder = save_tiny(tmp_path / "model", reference)
    to_orbax(folder, tmp_path / "converted", None, lambda count: None, name="tiny")
    to_safetensors(tmp_path / "converted", tmp_path / "back", lambda count: None)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "back"))
    if dtype == "bfloat16":
        assert "lm_head.weight" not in after
        before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype == DTYPES[dtype]
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_transformers_loads_what_we_write(reference, published, tmp_path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    kind, model = load_model(published, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields)
    back, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = reference.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
