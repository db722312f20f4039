"""The Qwen3-VL table against published names and shapes, and against a PyTorch model."""

from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import pytest
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.published import save_hf
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.placement import Placement
from tests.families.qwen3_vl import tiny_qwen3_vl
from tests.torch_support import save_tiny

pytestmark = pytest.mark.torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def published_shapes(sizes: dict) -> dict[str, list[int]]:
    """Names and shapes of the published files, by rule; heads have 128 numbers."""
    width, ffn, q, kv = sizes["D"], sizes["F"], 128 * sizes["N"], 128 * sizes["K"]
    e, f = sizes["E"], sizes["f"]
    shapes = {"embed_tokens.weight": [151936, width], "norm.weight": [width]}
    for layer in range(sizes["L"]):
        for name, shape in {
            "input_layernorm": [width],
            "post_attention_layernorm": [width],
            "self_attn.q_proj": [q, width],
            "self_attn.k_proj": [kv, width],
            "self_attn.v_proj": [kv, width],
            "self_attn.o_proj": [width, q],
            "self_attn.q_norm": [128],
            "self_attn.k_norm": [128],
            "mlp.gate_proj": [ffn, width],
            "mlp.up_proj": [ffn, width],
            "mlp.down_proj": [width, ffn],
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    shapes = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    if not sizes["tied"]:
        shapes["lm_head.weight"] = [151936, width]
    tower = {"patch_embed.proj": [e, 3, 2, 16, 16], "merger.norm": [e]}
    for merger in ("merger", *(f"deepstack_merger_list.{number}" for number in range(3))):
        tower |= {f"{merger}.linear_fc1": [4 * e, 4 * e], f"{merger}.linear_fc2": [width, 4 * e]}
        tower.setdefault(f"{merger}.norm", [4 * e])
    for block in range(sizes["depth"]):
        at = f"blocks.{block}."
        tower |= {f"{at}norm1": [e], f"{at}norm2": [e], f"{at}attn.qkv": [3 * e, e], f"{at}attn.proj": [e, e]}
        tower |= {f"{at}mlp.linear_fc1": [f, e], f"{at}mlp.linear_fc2": [e, f]}
    for name, shape in tower.items():
        shapes[f"model.visual.{name}.weight"] = shape
        shapes[f"model.visual.{name}.bias"] = shape[:1]
    return shapes | {"model.visual.pos_embed.weight": [2304, e]}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return tiny_qwen3_vl(1)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)


class TestQwen3VLWeights(WeightsContract):
    facts: ClassVar = {
        name: PublishedFacts(published_files.qwen3_vl(sizes), published_shapes(sizes), sizes["numbers"], name)
        for name, sizes in published_files.QWEN3_VL_SIZES.items()
    }

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        text = reference.model.language_model
        placed.check("decoder.embedding", text.embed_tokens.weight)
        placed.check("decoder.norm.scale", text.norm.weight)
        placed.check("decoder.head", reference.lm_head.weight)
        for i, layer in enumerate(text.layers):
            at, attention = "decoder.layers.", layer.self_attn
            placed.check(at + "input_norm.scale", layer.input_layernorm.weight, i)
            placed.check(at + "ffn_norm.scale", layer.post_attention_layernorm.weight, i)
            for part, heads in (("q_proj", 6), ("k_proj", 2), ("v_proj", 2)):
                kernel = getattr(attention, part).weight.T.reshape(60, heads, 14)
                placed.check(f"{at}attention.{part}.kernel", kernel, i)
            placed.check(at + "attention.o_proj.kernel", attention.o_proj.weight.T.reshape(6, 14, 60), i)
            placed.check(at + "attention.q_norm.scale", attention.q_norm.weight, i)
            placed.check(at + "attention.k_norm.scale", attention.k_norm.weight, i)
            placed.check(at + "ffn.gate_proj.kernel", layer.mlp.gate_proj.weight, i)
            placed.check(at + "ffn.up_proj.kernel", layer.mlp.up_proj.weight, i)
            placed.check(at + "ffn.down_proj.kernel", layer.mlp.down_proj.weight.T, i)
        self.place_tower(placed, reference.model.visual)

    def place_tower(self, placed: Placement, vision: torch.nn.Module) -> None:
        placed.check("vision.patch_embed.kernel", vision.patch_embed.proj.weight.reshape(24, -1).T)
        placed.check("vision.patch_embed.bias", vision.patch_embed.proj.bias)
        placed.check("vision.position_embedding", vision.pos_embed.weight)
        mergers = {f"vision.deepstack.{i}": merger for i, merger in enumerate(vision.deepstack_merger_list)}
        for at, merger in (mergers | {"vision.merger": vision.merger}).items():
            placed.check_norm(f"{at}.norm", merger.norm)
            placed.check_linear(f"{at}.fc1", merger.linear_fc1)
            placed.check_linear(f"{at}.fc2", merger.linear_fc2)
        for i, block in enumerate(vision.blocks):
            at = "vision.layers."
            for j, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(j * 24, (j + 1) * 24)
                placed.check(f"{at}{part}.kernel", block.attn.qkv.weight[rows].T.reshape(24, 3, 8), i)
                placed.check(f"{at}{part}.bias", block.attn.qkv.bias[rows].reshape(3, 8), i)
            placed.check_mixed(at + "o_proj", block.attn.proj, i)
            placed.check_linear(at + "fc1", block.mlp.linear_fc1, i)
            placed.check_linear(at + "fc2", block.mlp.linear_fc2, i)
            placed.check_norm(at + "attention_norm", block.norm1, i)
            placed.check_norm(at + "mlp_norm", block.norm2, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_and_back_is_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Of a tied head too, whose file has none."""
    from safetensors.torch import load_file

    reference = tiny_qwen3_vl(2, num_hidden_layers=4, tie_word_embeddings=dtype == "bfloat16").to(DTYPES[dtype])
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
    from transformers import Qwen3VLForConditionalGeneration

    kind, model = load_model(published, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields)
    back, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = reference.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
