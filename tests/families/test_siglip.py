"""Parity of the SigLIP tower with Hugging Face's in float32, filled through its mapping rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.checkpoints.leaves import Filler, shapes_of
from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.siglip import SiglipTower, read_siglip, siglip_parts
from rlens_jax.families.table import Table
from rlens_jax.ops import tower_attention
from tests.numerics import assert_close, error
from tests.torch_support import redraw

pytestmark = pytest.mark.torch

TOLERANCE = 1e-5
FIELDS = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_channels": 3,
    "image_size": 22,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
SIDE = 5
"""Patches a side: 22 // 4, the last two pixels are cut off."""


class Holder(nnx.Module):
    def __init__(self, tower: SiglipTower):
        self.tower = tower


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**FIELDS, vision_use_head=False, attn_implementation="eager")
    model = SiglipVisionModel(config)
    redraw(model, 0)
    return model.eval()


@pytest.fixture
def ours(theirs) -> SiglipTower:
    """A fresh copy, to be changed at will."""
    config = read_siglip(ConfigReader(FIELDS, "vision_config"))
    abstract = nnx.eval_shape(lambda: Holder(SiglipTower(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    table = Table(siglip_parts(config, "", "tower."))
    table.check_covers(shapes_of(abstract))
    filler = Filler(abstract)
    for name, tensor in table.tensors.items():
        array = state.pop(name).numpy()
        for place, part in zip(tensor.places, tensor.to_ours(array), strict=True):
            filler.put(place, filler.held(place, part))
    assert set(state) == {"post_layernorm.weight", "post_layernorm.bias"}
    return filler.model().tower


PIXELS = np.random.default_rng(1).normal(size=(2, 3, 22, 22)).astype(np.float32)


def cut(pixels: np.ndarray) -> np.ndarray:
    """Images [I, 3, 22, 22] as patches [I, 25, 48]; what does not fill a patch is left out."""
    used = pixels[:, :, : SIDE * 4, : SIDE * 4].reshape(len(pixels), 3, SIDE, 4, SIDE, 4)
    return used.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), SIDE**2, 48)


@torch.no_grad()
def their_features(model: torch.nn.Module) -> np.ndarray:
    return model(torch.tensor(PIXELS), output_hidden_states=True).hidden_states[-1].numpy()


def our_features(tower: SiglipTower, padding: int = 7) -> np.ndarray:
    """Features of both images; `padding` patches of huge values follow the real ones."""
    patches = np.pad(cut(PIXELS), ((0, 0), (0, padding), (0, 0)), constant_values=1e3)
    positions = np.pad(np.tile(np.arange(SIDE**2, dtype=np.int32), (2, 1)), ((0, 0), (0, padding)))
    features = jax.jit(tower)(patches, positions, np.full(2, SIDE**2, np.int32))
    return np.asarray(features)[:, : SIDE**2]


@pytest.mark.parametrize("padding", [0, 7])
def test_features(theirs, ours, padding):
    expected = their_features(theirs)
    assert expected.std() > 1
    assert_close(our_features(ours, padding), expected, TOLERANCE)


def test_blocks_of_queries_do_not_matter(theirs, ours, monkeypatch):
    monkeypatch.setattr(tower_attention, "WHOLE", 8)
    monkeypatch.setattr(tower_attention, "CPU_QUERIES", 9)
    assert_close(our_features(ours), their_features(theirs), TOLERANCE)


def test_images_of_different_patch_counts(ours):
    """A smaller image beside a larger one gives what it gives alone."""
    patches, positions = cut(PIXELS), np.tile(np.arange(SIDE**2, dtype=np.int32), (2, 1))
    both = jax.jit(ours)(patches, positions, np.array([SIDE**2, 11], np.int32))
    alone = jax.jit(ours)(patches[1:, :11], positions[1:, :11], np.array([11], np.int32))
    assert_close(both[1, :11], alone[0], TOLERANCE)
    assert error(both[1, :11], our_features(ours)[1, :11]) > 100 * TOLERANCE


def test_positions_are_data(theirs, ours):
    """Patches in another order, with their positions, give the same features in that order."""
    order = np.random.default_rng(2).permutation(SIDE**2)
    positions = np.tile(order.astype(np.int32), (2, 1))
    features = jax.jit(ours)(cut(PIXELS)[:, order], positions, np.full(2, SIDE**2, np.int32))
    assert_close(features, their_features(theirs)[:, order], TOLERANCE)


def dropped_query_bias_of_one_layer(tower):
    bias = tower.layers.q_proj.bias
    bias[...] = bias[...].at[1].set(0)


def dropped_patch_bias(tower):
    tower.patch_embed.bias[...] = jnp.zeros_like(tower.patch_embed.bias[...])


def swapped_norms(tower):
    first, second = tower.layers.attention_norm.scale, tower.layers.mlp_norm.scale
    first[...], second[...] = second[...], first[...]


def lost_positions(tower):
    tower.position_embedding[...] = jnp.roll(tower.position_embedding[...], 1, axis=0)


@pytest.mark.parametrize("mutate", [dropped_query_bias_of_one_layer, dropped_patch_bias, swapped_norms, lost_positions])
def test_a_wrong_tower_misses_by_a_hundred_tolerances(theirs, ours, mutate):
    mutate(ours)
    assert error(our_features(ours), their_features(theirs)) > 100 * TOLERANCE


def test_another_activation_is_refused():
    with pytest.raises(UserError, match="vision_config: hidden_act = 'quick_gelu' is not supported"):
        read_siglip(ConfigReader({**FIELDS, "hidden_act": "quick_gelu"}, "vision_config"))
