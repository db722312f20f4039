"""The LLaVA-OneVision table against published names and shapes, and against a PyTorch model in every spelling."""

from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.errors import UserError
from rlens_jax.families.registry import read_kind
from tests.checkpoints.tiny import assert_same, change
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.llava_onevision import tiny_llava
from tests.families.placement import Placement
from tests.torch_support import save_tiny

pytestmark = pytest.mark.torch

POST_NORM = [f"vision_tower.vision_model.post_layernorm.{name}" for name in ("weight", "bias")]
SPELLINGS = {"published": {}, "in memory": {"save_original_format": False}, "sharded": {"max_shard_size": "200KB"}}


def published_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published 7B file, by rule."""
    shapes = {
        "language_model.model.embed_tokens.weight": [152128, 3584],
        "language_model.model.norm.weight": [3584],
        "language_model.lm_head.weight": [152128, 3584],
        "image_newline": [3584],
        "multi_modal_projector.linear_1.weight": [3584, 1152],
        "multi_modal_projector.linear_1.bias": [3584],
        "multi_modal_projector.linear_2.weight": [3584, 3584],
        "multi_modal_projector.linear_2.bias": [3584],
        "vision_tower.vision_model.embeddings.patch_embedding.weight": [1152, 3, 14, 14],
        "vision_tower.vision_model.embeddings.patch_embedding.bias": [1152],
        "vision_tower.vision_model.embeddings.position_embedding.weight": [729, 1152],
        **{name: [1152] for name in POST_NORM},
    }
    for layer in range(28):
        at = f"language_model.model.layers.{layer}."
        for name, rows, columns, bias in (
            ("self_attn.q_proj", 3584, 3584, True),
            ("self_attn.k_proj", 512, 3584, True),
            ("self_attn.v_proj", 512, 3584, True),
            ("self_attn.o_proj", 3584, 3584, False),
            ("mlp.gate_proj", 18944, 3584, False),
            ("mlp.up_proj", 18944, 3584, False),
            ("mlp.down_proj", 3584, 18944, False),
        ):
            shapes[f"{at}{name}.weight"] = [rows, columns]
            if bias:
                shapes[f"{at}{name}.bias"] = [rows]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = [3584]
    for layer in range(26):
        at = f"vision_tower.vision_model.encoder.layers.{layer}."
        linears = [(f"self_attn.{x}_proj", 1152, 1152) for x in ("q", "k", "v", "out")]
        for name, rows, columns in (*linears, ("mlp.fc1", 4304, 1152), ("mlp.fc2", 1152, 4304)):
            shapes[f"{at}{name}.weight"], shapes[f"{at}{name}.bias"] = [rows, columns], [rows]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{at}{name}.weight"] = shapes[f"{at}{name}.bias"] = [1152]
    return shapes


def test_the_published_small_model_is_tied_by_its_text_config_alone():
    text = {**published_files.llava_onevision()["text_config"], "tie_word_embeddings": True}
    table = read_kind(published_files.llava_onevision(text_config=text), "config.json").table()
    assert "language_model.lm_head.weight" not in table.tensors
    assert table.copies == {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return tiny_llava(1)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)


class TestLlavaOnevisionWeights(WeightsContract):
    facts: ClassVar = {
        "7b": PublishedFacts(
            published_files.llava_onevision(), published_shapes(), 8030807584, "llava-onevision-qwen2-7b-ov-hf", unused=POST_NORM
        )
    }

    def place(self, placed: Placement, reference: torch.nn.Module) -> None:
        placed.check_decoder(reference.model.language_model, reference.lm_head, num_heads=6)
        placed.check("vision.image_newline", reference.model.image_newline)
        placed.check_linear("vision.projector_fc1", reference.model.multi_modal_projector.linear_1)
        placed.check_linear("vision.projector_fc2", reference.model.multi_modal_projector.linear_2)
        placed.check_siglip("vision.tower.", reference.model.vision_tower)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_transformers_writes_gives_the_same_model(reference, published, spelling, tmp_path):
    folder = save_tiny(tmp_path / "model", reference, **SPELLINGS[spelling])
    if spelling == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


OLD = "language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""
PREFIXES = {
    "published": OLD,
    "transformers 5, the tower without its level": (*OLD[:2], "vision_tower.", ""),
    "in memory since 4.52": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model."),
    "in memory of transformers 5": ("model.language_model.", "lm_head.", "model.vision_tower.", "model."),
}
"""Of the decoder, its head, the tower, and of connector and newline."""


@pytest.mark.parametrize("spelling", PREFIXES)
def test_every_spelling_gives_the_same_model(reference, published, spelling, tmp_path):
    """Names written out here, from those of the module tree."""
    folder = save_tiny(tmp_path / "model", reference)
    decoder, head, tower, rest = PREFIXES[spelling]
    renames = (("model.language_model.", decoder), ("lm_head.", head), ("model.vision_tower.", tower))
    state = {}
    for name, tensor in reference.state_dict().items():
        source, target = next(pair for pair in (*renames, ("model.", rest)) if name.startswith(pair[0]))
        state[target + name.removeprefix(source)] = tensor.numpy()

    def rewrite(tensors: dict[str, np.ndarray]) -> None:
        tensors.clear()
        tensors.update(state)

    change(folder, rewrite)
    assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


def test_transformers_loads_what_we_write(reference, published, tmp_path):
    from transformers import LlavaOnevisionForConditionalGeneration

    kind, model = load_model(published, jnp.float32)
    save_hf(tmp_path / "back", model, kind.fields)
    back, info = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    unused = {name.split(".")[-2] for name in info["missing_keys"]}
    assert unused == {"post_layernorm"}
    expected = reference.state_dict()
    for name, tensor in back.state_dict().items():
        assert "post_layernorm" in name or torch.equal(tensor, expected[name.replace("vision_model.", "")]), name


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer = -2 is not supported (only -1)"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy = 'default' is not supp"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu' is not supported (only 'gelu')"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False is not supported"),
        ({"use_image_newline_parameter": False}, "use_image_newline_parameter = False is not supported"),
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is supported only as 'anyres_max_N'"),
        ({"image_grid_pinpoints": [[384, 400]]}, "image_grid_pinpoints contains [384, 400]; only [height, width]"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints must be a list"),
        ({"image_token_index": None}, "image_token_index must be a token id"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type = 'llama' is not supported"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is not supported"),
        ({"model_type": "llava"}, "vision_config: model_type = 'siglip_vision_model' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(fields, complaint):
    with pytest.raises(UserError) as error:
        read_kind(published_files.llava_onevision(**fields), "config.json")
    assert complaint in str(error.value)
    assert str(error.value).startswith("config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors: tensors.pop("image_newline"), "image_newline: missing, expected with shape [60]"),
        (
            lambda tensors: tensors.update(image_newlien=tensors.pop("image_newline")),
            "image_newlien: not known (did you mean 'image_newline'?)",
        ),
        (
            lambda tensors: tensors.update(image_newline=tensors["image_newline"][:59]),
            "image_newline: has shape [59], expected [60]",
        ),
        (lambda tensors: tensors.update({"model.image_newline": tensors["image_newline"]}), "model.image_newline: doubled"),
        (
            lambda tensors: tensors.update(image_newline=np.full(60, np.nan, np.float32)),
            "image_newline: holds NaN or infinite values",
        ),
    ],
)
def test_damaged_weights_are_refused(reference, damage, complaint, tmp_path):
    folder = save_tiny(tmp_path / "model", reference)
    change(folder, damage)
    with pytest.raises(UserError) as error:
        load_model(folder, jnp.float32)
    assert complaint in str(error.value)
