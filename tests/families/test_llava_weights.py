"""The tables of LLaVA-1.5 and LLaVA-NeXT against published names and shapes, and against PyTorch models in every spelling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_torch

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.published import save_hf
from tests.checkpoints.tiny import assert_same, change
from tests.families import published as published_files
from tests.families.contract import PublishedFacts, WeightsContract
from tests.families.llava import MAKE
from tests.families.placement import Placement
from tests.torch_support import save_tiny

pytestmark = pytest.mark.torch

TOWER = "vision_tower.vision_model."
LINEARS = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]


def published_shapes(*, width: int, ffn: int, layers: int, kv_width: int, newline: bool) -> dict[str, list[int]]:
    """Names and shapes of a published file, by rule."""
    shapes = {
        "language_model.model.embed_tokens.weight": [32064, width],
        "language_model.model.norm.weight": [width],
        "language_model.lm_head.weight": [32064, width],
        "multi_modal_projector.linear_1.weight": [width, 1024],
        "multi_modal_projector.linear_1.bias": [width],
        "multi_modal_projector.linear_2.weight": [width, width],
        "multi_modal_projector.linear_2.bias": [width],
        f"{TOWER}embeddings.class_embedding": [1024],
        f"{TOWER}embeddings.patch_embedding.weight": [1024, 3, 14, 14],
        f"{TOWER}embeddings.position_embedding.weight": [577, 1024],
        **({"image_newline": [width]} if newline else {}),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes[f"{TOWER}{name}.weight"] = shapes[f"{TOWER}{name}.bias"] = [1024]
    for layer in range(layers):
        at = f"language_model.model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", kv_width, width),
            ("self_attn.v_proj", kv_width, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", ffn, width),
            ("mlp.up_proj", ffn, width),
            ("mlp.down_proj", width, ffn),
        ):
            shapes[f"{at}{name}.weight"] = [rows, columns]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = [width]
    for layer in range(24):
        at = f"{TOWER}encoder.layers.{layer}."
        for name, rows, columns in (*((x, 1024, 1024) for x in LINEARS), ("mlp.fc1", 4096, 1024), ("mlp.fc2", 1024, 4096)):
            shapes[f"{at}{name}.weight"], shapes[f"{at}{name}.bias"] = [rows, columns], [rows]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{at}{name}.weight"] = shapes[f"{at}{name}.bias"] = [1024]
    return shapes


VICUNA_7B = published_shapes(width=4096, ffn=11008, layers=32, kv_width=4096, newline=False)
VICUNA_13B = published_shapes(width=5120, ffn=13824, layers=40, kv_width=5120, newline=False)
MISTRAL_7B = published_shapes(width=4096, ffn=14336, layers=32, kv_width=1024, newline=True)
UNUSED = [name for name in VICUNA_7B if name.startswith((f"{TOWER}encoder.layers.23.", f"{TOWER}post_layernorm."))]


class LlavaWeights(WeightsContract):
    family: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> torch.nn.Module:
        return MAKE[cls.family](1)

    @pytest.fixture(scope="class")
    @classmethod
    def published(cls, reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_tiny(tmp_path_factory.mktemp("published") / "model", reference)

    def place(self, placed: Placement, reference: Any) -> None:
        placed.check_decoder(reference.model.language_model, reference.lm_head, num_heads=6)
        placed.check_linear("vision.projector_fc1", reference.model.multi_modal_projector.linear_1)
        placed.check_linear("vision.projector_fc2", reference.model.multi_modal_projector.linear_2)
        tower = reference.model.vision_tower
        placed.check("vision.tower.class_embedding", tower.embeddings.class_embedding)
        placed.check_norm("vision.tower.pre_norm", tower.pre_layrnorm)
        placed.check_siglip("vision.tower.", tower, unused=1)
        if self.family == "llava_next":
            placed.check("vision.image_newline", reference.model.image_newline)

    def test_transformers_loads_what_we_write(self, reference: Any, published: Path, tmp_path: Path) -> None:
        kind, model = load_model(published, jnp.float32)
        save_hf(tmp_path / "back", model, kind.fields)
        back, info = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        expected, behind = reference.state_dict(), ("encoder.layers.3.", "post_layernorm.")
        assert info["missing_keys"]
        assert all(any(part in name for part in behind) for name in info["missing_keys"])
        for name, tensor in back.state_dict().items():
            mine = expected.get(name, expected.get(name.replace("vision_model.", "")))
            assert any(part in name for part in behind) or torch.equal(tensor, mine), name


OLD = "language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""
PREFIXES = (
    OLD,
    (*OLD[:2], "vision_tower.", ""),  # transformers 5, the tower without its level
    ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model."),  # in memory since 4.52
    ("model.language_model.", "lm_head.", "model.vision_tower.", "model."),  # in memory of transformers 5
)
"""Of the decoder, its head, the tower, and of connector and newline."""


def replaced_by(state: dict[str, np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def rewrite(tensors: dict[str, np.ndarray]) -> None:
        tensors.clear()
        tensors.update(state)

    return rewrite


class TestLlavaWeights(LlavaWeights):
    family = "llava"
    facts: ClassVar = {
        "7b": PublishedFacts(
            published_files.llava(published_files.VICUNA), VICUNA_7B, 7063427072, "llava-1.5-7b-hf", unused=UNUSED
        ),
        "13b": PublishedFacts(
            published_files.llava(published_files.VICUNA_13B), VICUNA_13B, 13351494656, "llava-1.5-13b-hf", unused=UNUSED
        ),
    }


class TestLlavaNextWeights(LlavaWeights):
    family = "llava_next"
    facts: ClassVar = {
        "mistral": PublishedFacts(
            published_files.llava_next(published_files.MISTRAL), MISTRAL_7B, 7566747648, "llava-v1.6-mistral-7b-hf", unused=UNUSED
        ),
        "vicuna": PublishedFacts(
            published_files.llava_next(published_files.VICUNA),
            VICUNA_7B | {"image_newline": [4096]},
            7063427072 + 4096,
            "llava-v1.6-vicuna-7b-hf",
            unused=UNUSED,
        ),
    }

    @pytest.mark.parametrize("prefixes", range(4))
    def test_every_spelling_gives_the_same_model(self, reference: Any, published: Path, prefixes: int, tmp_path: Path) -> None:
        """Names written out here, from those of the module tree."""
        folder, state = save_tiny(tmp_path / "model", reference), {}
        decoder, head, tower, rest = PREFIXES[prefixes]
        renames = (("model.language_model.", decoder), ("lm_head.", head), ("model.vision_tower.", tower), ("model.", rest))
        for name, tensor in reference.state_dict().items():
            source, target = next(pair for pair in renames if name.startswith(pair[0]))
            state[target + name.removeprefix(source)] = tensor.numpy()
        change(folder, replaced_by(state))
        assert_same(load_model(folder, jnp.float32)[1], load_model(published, jnp.float32)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llava", "float16"), ("llava_next", "bfloat16"), ("llava_next", "float32")])
def test_conversion_both_ways_keeps_every_bit_of_every_tensor(family: str, dtype: str, tmp_path: Path) -> None:
    """Those that no visual token is made of, too."""
    source = save_tiny(tmp_path / "source", MAKE[family](2).to(getattr(torch, dtype)))
    converted = to_orbax(source, tmp_path / "converted", None, lambda count: None, name="tiny")
    carried = sorted(name.removeprefix("vision_tower.").removeprefix("vision_model.") for name in converted.carried)
    assert len(carried) == 16 + 2 and carried[0].startswith("encoder.layers.3.") and carried[-1] == "post_layernorm.weight"
    to_safetensors(tmp_path / "converted", tmp_path / "back", lambda count: None)
    theirs, ours = (load_torch(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) and tensor.dtype == ours[name].dtype for name, tensor in theirs.items())


def test_a_head_in_the_file_counts_whatever_the_flag_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model", MAKE["llava"](1))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    kind, _ = load_model(folder, jnp.float32)
    assert not kind.config.decoder.tied_head
    assert "differs from" in capsys.readouterr().err
