"""Abstract inputs of programs, compared with the arrays of the families' preparers and of a run."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.config import RunConfig, SearchConfig
from rlens_jax.dry_run.program import program_specs
from rlens_jax.engine.sizes import Placed, abstract_batch, abstract_images, abstract_model, bytes_on_device
from rlens_jax.errors import UserError
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import Places, Prompt, collate_alone
from rlens_jax.sharding.mesh import make_mesh

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
LARGEST = {
    "internvl2_8b": 13312,
    "internvl3_5_8b": 13312,
    "llava_1_5_7b_hf": 576,
    "llava_onevision_qwen2_7b_ov_hf": 26973,
    "llava_v1_6_mistral_7b_hf": 2880,
    "minicpm_v_2_6": 1152,
    "qwen2_5_vl_7b": 65536,
    "qwen2_vl_7b": 65536,
    "qwen3_vl_8b": 65536,
}
VISUAL = {
    "internvl2_8b": 3328,
    "internvl3_5_8b": 3328,
    "llava_1_5_7b_hf": 576,
    "llava_v1_6_mistral_7b_hf": 2928,
    "minicpm_v_2_6": 640,
    "qwen2_5_vl_7b": 16384,
    "qwen2_vl_7b": 16384,
    "qwen3_vl_8b": 16384,
}
"""Visual tokens of the largest image."""


@pytest.fixture(params=LARGEST)
def kind(request: pytest.FixtureRequest) -> ModelKind:
    return read_model_kind(MODELS / request.param)


def mesh() -> jax.sharding.Mesh:
    return make_mesh(jax.devices()[:1], 1)


def test_a_config_json_is_enough_and_weighs_what_the_model_does(kind: ModelKind) -> None:
    model = abstract_model(kind, "bfloat16", mesh())
    # 7 to 8 billion parameters and a tower, two bytes each
    assert 14e9 < bytes_on_device(model) < 18e9


def test_images_run_through_the_vision_tower_as_they_are(kind: ModelKind) -> None:
    images = abstract_images(kind.image_arrays(kind.image_sizes((LARGEST[kind_name(kind)],))[-1]), 2, mesh())
    model: Any = abstract_model(kind, "bfloat16", mesh())
    tokens = jax.eval_shape(lambda model, *arrays: model.vision(*arrays), model, *images)
    assert tokens.shape == (2, VISUAL.get(kind_name(kind), tokens.shape[1]), kind.config.decoder.visual_width)


def kind_name(kind: ModelKind) -> str:
    return next(name for name in LARGEST if read_model_kind(MODELS / name) == kind)


def test_a_batch_is_shaped_as_collate_makes_it() -> None:
    bucket = Bucket(5, 7)
    prompt = Prompt(np.zeros(3, np.int32), np.zeros(3, bool), np.zeros((3, 3), np.int32), 3, 1)
    real = collate_alone([prompt] * 4, bucket, 16)
    abstract = abstract_batch(bucket, Places(1, 16), 4, 3, Placed(mesh()))
    assert jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def embedded_specs(**changes: Any) -> list[Any]:
    rows, images = {Bucket(32, 128): 2}, {(512,): 3}
    return list(program_specs(RunConfig(**changes), read_model_kind("embedded"), mesh(), rows, images))


def test_the_programs_of_buckets() -> None:
    assert [(spec.name, spec.bucket, spec.rows, spec.slots) for spec in embedded_specs()] == [
        ("encode", "patches 512", 3, 3 * 512),
        ("embed", "text 32, visual 128", 2, 2 * 160),
        ("layers", "text 32, visual 128", 2, 2 * 160),
        ("last layer", "text 32, visual 128", 2, 2 * 160),
        ("outcome", "text 32, visual 128", 2, 2 * 160),
    ]


def test_generation_has_one_program() -> None:
    search = SearchConfig(objective="generation", max_new_tokens=7)
    (_, generate) = embedded_specs(search=search)
    assert (generate.name, generate.steps, generate.layers) == ("generate", 7, 12)


@pytest.mark.parametrize("name", ["encode", "embed", "layers", "last layer", "outcome"])
def test_the_runs_own_programs_lower(name: str) -> None:
    (spec,) = (spec for spec in embedded_specs() if spec.name == name)
    lowered = spec.lower()
    assert f"@jit_{name.replace(' ', '_')} " in lowered.as_text()[:200]


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    shutil.copy(MODELS / "minicpm_v_2_6" / "config.json", tmp_path)
    assert read_model_kind(tmp_path).model_type == "minicpmv"
    with pytest.raises(UserError, match=r"none of \[1000\] holds the patches"):
        read_model_kind(MODELS / "internvl2_8b").image_sizes((1000,))
