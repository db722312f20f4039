"""The InternVL table against published names and shapes, and against a PyTorch model in every spelling."""

import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from tests.checkpoints.tiny import assert_same, change
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.internvl import SIX_B, save_native, tiny_internvl
from tests.families.placement import Placement
from tests.test_convert import DTYPES, rewrite, round_trip
from tests.torch_support import save_tiny

pytestmark = pytest.mark.torch

NUMBERS = {
    "internvl2-8b": 16150730752 // 2,
    "internvl3-1b-hf": 938193024,
    "internvl3_5-1b": 1060897792,
    "internvl3_5-4b": 4732489216,
    "internvl3_5-8b": 8528318464,
    "internvl3_5-8b-hf": 8528318464,
}
"""Parameters of the published files, of the 4B by rule; InternVL2-8B is published in bfloat16 with 16150730752 bytes."""


def linear(name: str, rows: int, columns: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def norm(name: str, width: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def native_8b_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published files, by rule."""
    text = "language_model.model."
    shapes = native_vision_shapes(4096) | {
        text + "tok_embeddings.weight": [92553, 4096],
        text + "norm.weight": [4096],
        "language_model.output.weight": [92553, 4096],
    }
    for layer in range(32):
        at = f"{text}layers.{layer}."
        shapes |= {
            at + "attention.wqkv.weight": [6144, 4096],
            at + "attention.wo.weight": [4096, 4096],
            at + "attention_norm.weight": [4096],
            at + "ffn_norm.weight": [4096],
            at + "feed_forward.w1.weight": [14336, 4096],
            at + "feed_forward.w2.weight": [4096, 14336],
            at + "feed_forward.w3.weight": [14336, 4096],
        }
    return shapes


def native_vision_shapes(width: int) -> dict[str, list[int]]:
    """The 300M tower, and the connector to a decoder of this width."""
    tower = "vision_model.embeddings."
    shapes = {
        tower + "class_embedding": [1, 1, 1024],
        tower + "position_embedding": [1, 1025, 1024],
        tower + "patch_embedding.weight": [1024, 3, 14, 14],
        tower + "patch_embedding.bias": [1024],
        **norm("mlp1.0", 4096),
        **linear("mlp1.1", width, 4096),
        **linear("mlp1.3", width, width),
    }
    for layer in range(24):
        at = f"vision_model.encoder.layers.{layer}."
        shapes |= linear(at + "attn.qkv", 3072, 1024) | linear(at + "attn.proj", 1024, 1024)
        shapes |= linear(at + "mlp.fc1", 4096, 1024) | linear(at + "mlp.fc2", 1024, 4096)
        shapes |= norm(at + "norm1", 1024) | norm(at + "norm2", 1024)
        shapes |= {at + "ls1": [1024], at + "ls2": [1024]}
    return shapes


def hf_vision_shapes(width: int) -> dict[str, list[int]]:
    """The same in the layout of transformers."""
    tower = "vision_tower.embeddings."
    shapes = {
        tower + "cls_token": [1, 1, 1024],
        tower + "position_embeddings": [1, 1025, 1024],
        tower + "patch_embeddings.projection.weight": [1024, 3, 14, 14],
        tower + "patch_embeddings.projection.bias": [1024],
        **norm("multi_modal_projector.layer_norm", 4096),
        **linear("multi_modal_projector.linear_1", width, 4096),
        **linear("multi_modal_projector.linear_2", width, width),
    }
    for layer in range(24):
        at = f"vision_tower.encoder.layer.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            shapes |= linear(f"{at}attention.{part}", 1024, 1024)
        shapes |= linear(at + "mlp.fc1", 4096, 1024) | linear(at + "mlp.fc2", 1024, 4096)
        shapes |= norm(at + "layernorm_before", 1024) | norm(at + "layernorm_after", 1024)
        shapes |= {at + "lambda_1": [1024], at + "lambda_2": [1024]}
    return shapes


def hf_1b_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published files, by rule."""
    shapes = hf_vision_shapes(896) | qwen_shapes(24, 896, 4864, 151674, queries=896, keys=128)
    for layer in range(24):
        for part, rows in (("q_proj", 896), ("k_proj", 128), ("v_proj", 128)):
            shapes[f"language_model.model.layers.{layer}.self_attn.{part}.bias"] = [rows]
    return shapes


def qwen3_shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of a published InternVL3.5, by rule."""
    layout = hf_vision_shapes if name.endswith("-hf") else native_vision_shapes
    d, f, layers, heads = published_files.QWEN3_SIZES[name.removeprefix("internvl3_5-").removesuffix("-hf")].values()
    shapes = layout(d) | qwen_shapes(layers, d, f, 151936, queries=128 * heads, keys=1024)
    for layer in range(layers):
        for part in ("q_norm", "k_norm"):
            shapes[f"language_model.model.layers.{layer}.self_attn.{part}.weight"] = [128]
    return shapes


def qwen_shapes(layers: int, width: int, units: int, vocabulary: int, *, queries: int, keys: int) -> dict[str, list[int]]:
    """A Qwen2 or Qwen3 without biases and norms of q and k."""
    text = "language_model.model."
    shapes = {
        text + "embed_tokens.weight": [vocabulary, width],
        text + "norm.weight": [width],
        "language_model.lm_head.weight": [vocabulary, width],
    }
    for layer in range(layers):
        at = f"{text}layers.{layer}."
        for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{at}self_attn.{part}.weight"] = [rows, width]
        shapes |= {
            at + "self_attn.o_proj.weight": [width, queries],
            at + "input_layernorm.weight": [width],
            at + "post_attention_layernorm.weight": [width],
            at + "mlp.gate_proj.weight": [units, width],
            at + "mlp.up_proj.weight": [units, width],
            at + "mlp.down_proj.weight": [width, units],
        }
    return shapes


def facts_of(shapes: dict[str, dict[str, list[int]]]) -> dict[str, PublishedFacts]:
    return {name: PublishedFacts(published_files.internvl(name), found, NUMBERS[name], name) for name, found in shapes.items()}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return tiny_internvl(1, num_hidden_layers=3)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)


class TestInternVLWeights(WeightsContract):
    facts: ClassVar = facts_of({"internvl2-8b": native_8b_shapes(), "internvl3-1b-hf": hf_1b_shapes()})

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        placed.check_decoder(reference.model.language_model, reference.lm_head, num_heads=6)
        tower, connector = reference.model.vision_tower, reference.model.multi_modal_projector
        placed.check("vision.class_token", tower.embeddings.cls_token[0, 0])
        placed.check("vision.position", tower.embeddings.position_embeddings[0])
        patch = tower.embeddings.patch_embeddings.projection
        placed.check("vision.patch_embed.kernel", patch.weight.reshape(24, -1).T)
        placed.check("vision.patch_embed.bias", patch.bias)
        placed.check_norm("vision.connector_norm", connector.layer_norm)
        placed.check_linear("vision.connector_fc1", connector.linear_1)
        placed.check_linear("vision.connector_fc2", connector.linear_2)
        for i, layer in enumerate(tower.encoder.layer):
            at = "vision.layers."
            for part in ("q_proj", "k_proj", "v_proj"):
                placed.check_heads(at + part, getattr(layer.attention, part), i)
            placed.check_mixed(at + "o_proj", layer.attention.projection_layer, i)
            placed.check(at + "attention_scale", layer.lambda_1, i)
            placed.check(at + "mlp_scale", layer.lambda_2, i)
            placed.check_norm(at + "attention_norm", layer.layernorm_before, i)
            placed.check_norm(at + "mlp_norm", layer.layernorm_after, i)
            placed.check_linear(at + "fc1", layer.mlp.fc1, i)
            placed.check_linear(at + "fc2", layer.mlp.fc2, i)


class TestInternVL35Weights(TestInternVLWeights):
    facts: ClassVar = facts_of(
        {f"internvl3_5-{size}": qwen3_shapes(f"internvl3_5-{size}") for size in ("1b", "4b", "8b", "8b-hf")}
    )

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> torch.nn.Module:
        return tiny_internvl(8, "qwen3", num_hidden_layers=2)

    @pytest.fixture(scope="class")
    @classmethod
    def published(cls, reference, tmp_path_factory) -> Path:
        return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)

    @pytest.mark.parametrize("places", [(), ("",), ("", "text_config")], ids=["no flag", "outer flag", "both flags"])
    def test_a_head_in_the_file_counts_before_the_flag(self, published, places, tmp_path) -> None:
        """The published files have a head and no flag, and the default of transformers ties it."""
        folder = Path(shutil.copytree(published, tmp_path / "model"))
        fields = json.loads((folder / "config.json").read_text())
        for name, place in {"": fields, "text_config": fields["text_config"]}.items():
            del place["tie_word_embeddings"]
            place |= {"tie_word_embeddings": True} if name in places else {}
        (folder / "config.json").write_text(json.dumps(fields))
        kind, model = load_model(folder, jnp.float32)
        assert not kind.config.decoder.tied_head
        assert_same(model, load_model(published, jnp.float32)[1])

    def test_without_a_head_the_flag_decides(self, published, tmp_path) -> None:
        folder = Path(shutil.copytree(published, tmp_path / "model"))
        change(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
        with pytest.raises(UserError, match=r"language_model.lm_head.weight: missing"):
            load_model(folder, jnp.float32)
        fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(fields))
        kind, model = load_model(folder, jnp.float32)
        assert kind.config.decoder.tied_head and model.decoder.head is None

    @pytest.mark.slow
    @pytest.mark.parametrize("save", [save_tiny, save_native])
    def test_conversion_and_back_is_bit_for_bit(self, reference, save, tmp_path) -> None:
        """Tensors in all three dtypes."""
        source, dtypes = save(tmp_path / "model", reference), cycle(DTYPES.values())
        kind, model = load_model(source, jnp.float32)
        shutil.rmtree(source)
        save_hf(source, model, kind.fields, shard_bytes=50_000)
        rewrite(source, lambda name, array: (name, array.astype(next(dtypes))))
        round_trip(source, tmp_path)

    def test_native_and_hf_are_one_model(self, reference, published, tmp_path) -> None:
        native = save_native(tmp_path / "native", reference)
        assert_same(load_model(native, jnp.float32)[1], load_model(published, jnp.float32)[1])


@pytest.mark.parametrize(
    "save",
    [
        lambda folder, model: save_tiny(folder, model, save_original_format=False),
        lambda folder, model: save_tiny(folder, model, max_shard_size="200KB"),
        save_native,
    ],
    ids=["in memory", "sharded", "native"],
)
def test_every_spelling_gives_the_same_model(reference, published, save, tmp_path):
    folder = save(tmp_path / "model", reference)
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


@pytest.mark.parametrize("tower", [{}, SIX_B], ids=["300M", "6B"])
def test_internlm2_is_a_llama_by_other_names(tower, tmp_path):
    llama = tiny_internvl(2, "llama", vision=tower, num_hidden_layers=2)
    models = [
        load_model(save(tmp_path / name, llama), jnp.float32)[1] for name, save in (("hf", save_tiny), ("native", save_native))
    ]
    assert models[0].decoder.layers.attention.q_proj.bias is None
    assert_same(*models)


@pytest.mark.parametrize(
    ("save", "text_model"),
    [(save_tiny, "qwen2"), (save_native, "qwen2"), (save_native, "llama"), (save_tiny, "qwen3"), (save_native, "qwen3")],
)
def test_what_we_write_has_the_published_names(save, text_model, tmp_path):
    from safetensors.numpy import load_file

    folder = save(tmp_path / "model", tiny_internvl(3, text_model, num_hidden_layers=2))
    kind, model = load_model(folder, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_transformers_loads_what_we_write(reference, published, tmp_path):
    from transformers import InternVLForConditionalGeneration

    kind, model = load_model(published, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields)
    back, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = reference.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_tensor_of_the_other_layout_is_not_known(reference, tmp_path):
    folder = save_native(tmp_path / "model", reference)

    def misname(tensors: dict[str, np.ndarray]) -> None:
        tensors["vision_model.encoder.layers.1.lambda_1"] = tensors.pop("vision_model.encoder.layers.1.ls1")

    change(folder, misname)
    with pytest.raises(UserError) as error:
        load_model(folder, jnp.float32)
    assert "model.safetensors: vision_model.encoder.layers.1.lambda_1: not known" in str(error.value)
    assert "vision_model.encoder.layers.1.ls1: missing, expected with shape [24]" in str(error.value)
