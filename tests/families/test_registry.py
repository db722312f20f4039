"""A family is one folder and one line in the registry: everything else works with the toy family without a change."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rlens_jax.checkpoints.checkpoint import load_model, read_model_kind
from rlens_jax.checkpoints.conversion import to_orbax, to_safetensors
from rlens_jax.checkpoints.leaves import shapes_of
from rlens_jax.checkpoints.published import save_hf
from rlens_jax.data.benchmarks.catalogue import Instance
from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Shapes, row_buckets
from rlens_jax.errors import UserError
from rlens_jax.families import registry
from rlens_jax.models.forward import VisionLanguageModel, forward
from rlens_jax.models.prompt import Preparer
from rlens_jax.plans import Plan, Reduction
from rlens_jax.resources import preset_path
from rlens_jax.sharding.mesh import make_mesh
from tests.checkpoints import tiny
from tests.checkpoints.tiny import assert_same
from tests.families import toy_family
from tests.families.published import BY_MODEL_TYPE
from tests.families.toy_family.model import IMAGE_TOKEN, STOP

FIELDS = {
    "model_type": "toy",
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vision_config": {"depth": 1},
}
PLAN = Plan(attention=(0, 2), ffn=(1,))
SMALL = Reduction(attention_range=2, active_fraction=0.3)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in the registry."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, toy_family.FAMILY))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published folder of random weights, written by the mapping table from ours to the published names."""
    save_hf(tmp_path / "published", tiny.model(FIELDS), FIELDS)
    return tmp_path / "published"


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)

    def png(rows: int, columns: int) -> bytes:
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (rows, columns, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return [
        Sample("s0", "d", (png(2, 3),), "what", ("this",)),
        Sample("s1", "d", (png(1, 4), png(3, 3)), "and these", ("them", "those")),
        Sample("s2", "d", (), "no image", ("none",)),
    ]


def test_weights_load_and_come_back(folder: Path, tmp_path: Path) -> None:
    kind, model = load_model(folder, jnp.float32)
    assert isinstance(model, VisionLanguageModel)
    kind.table().check_covers(shapes_of(kind.abstract(jnp.float32)))
    save_hf(tmp_path / "back", model, kind.fields)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    to_orbax(folder, tmp_path / "converted", None, lambda count: None, name="toy")
    assert_same(load_model(tmp_path / "converted", jnp.float32)[1], model)
    to_safetensors(tmp_path / "converted", tmp_path / "again", lambda count: None)
    assert_same(load_model(tmp_path / "again", jnp.float32)[1], model)


def test_a_ranking_can_prepare_and_score_it(folder: Path) -> None:
    kind, model = load_model(folder, jnp.float32)
    mesh = make_mesh(jax.devices()[:1], 1)
    preparer = kind.preparer(folder)
    assert isinstance(preparer, Preparer)
    programs = Programs(model, mesh, SMALL, seed=0, new_tokens=1, stop_tokens=preparer.chat.stop_tokens)
    shapes = Shapes(row_buckets((16, 32), (0, 8, 16)), tuple(kind.image_sizes((8, 16))), kind.image_arrays, 2)
    split = build_split(samples(), preparer, programs, shapes, True)
    assert split.num_visual.tolist() == [6, 13, 0]
    assert split.num_text.tolist() == [4 + 5, 9 + 6, 8 + 5]
    assert [shape for shape, _ in kind.image_arrays((16,))] == [(16, 3)]


def test_a_question_of_a_benchmark(folder: Path) -> None:
    kind = read_model_kind(folder)
    instance = Instance("MME", "3", "Is it red?", ("Yes",), {}, {}, (b"",))
    assert kind.benchmark_prompt(instance).text == "toy: Is it red?"


def test_reference_inputs_reach_the_logits(folder: Path) -> None:
    kind, model = load_model(folder, jnp.float32)
    assert kind.family.reference.names == ("input_ids", "attention_mask", "colours")
    ids = np.array([[IMAGE_TOKEN] * 4 + [65, 66], [67, 68, STOP, 0, 0, 0]])
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3])
    colours = np.random.default_rng(1).random((1, 4, 3)).astype(np.float32)
    rows = kind.family.reference.read(
        "bundle", {"input_ids": ids, "attention_mask": mask, "colours": colours}, kind.config, Path()
    )
    assert [row.prompt.is_visual.tolist() for row in rows] == [[True] * 4 + [False] * 2, [False] * 3]
    assert [row.prompt.rope_positions.tolist() for row in rows] == [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2]]]
    assert [len(row.images) for row in rows] == [1, 0]
    np.testing.assert_array_equal(rows[0].images[0].arrays[0], colours[0])
    logits = forward(model, [row.images for row in rows], [row.prompt for row in rows], PLAN, SMALL)
    assert [row.shape for row in logits] == [(6, 258), (3, 258)]
    with pytest.raises(UserError, match="bundle: colours has 1 images, input_ids has tokens for 0"):
        kind.family.reference.read("bundle", {"input_ids": ids[1:, :3], "colours": colours}, kind.config, Path())


def test_an_unknown_family_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"model_type 'toyy' is not supported \(did you mean 'toy'\?\)"):
        registry.read_kind(FIELDS | {"model_type": "toyy"}, "config.json")


def test_no_model_type_belongs_to_two_families() -> None:
    names = [name for family in registry.FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))


def test_every_family_has_a_published_config_here_and_a_preset() -> None:
    families = [family for family in registry.FAMILIES if family is not toy_family.FAMILY]
    assert {name for family in families for name in family.model_types} == set(BY_MODEL_TYPE)
    for fields in BY_MODEL_TYPE.values():
        assert preset_path(registry.read_kind(fields, "config.json").family.preset).is_file()
