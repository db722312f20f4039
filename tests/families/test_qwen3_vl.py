"""Parity with Hugging Face's Qwen3-VL in float32, through the real loader: deepstack, interleaved mRoPE, positions."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from rlens_jax.errors import UserError
from rlens_jax.families.qwen2_vl.preparer import patch_places
from rlens_jax.families.qwen3_vl.model import interpolated
from rlens_jax.families.registry import read_kind
from rlens_jax.models.forward import VisionLanguageModel, forward
from rlens_jax.models.prompt import ImageTokens, PreparedImage
from rlens_jax.plans import Plan
from tests.families.contract import BOTH, DENSE, SIMPLE, WHOLE, set_to, swap
from tests.families.pair import Pair, make_pair
from tests.families.published import kind_of
from tests.families.qwen2_vl import hf_inputs, make_example, our_images, prompt_of
from tests.families.qwen3_vl import DEEPSTACK, tiny_qwen3_vl
from tests.families.qwen_contract import QwenContract, run_tower, their_logits
from tests.numerics import assert_close, error

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"), tiny_qwen3_vl(0))


def with_decoder(model: VisionLanguageModel, **changes: object) -> None:
    """Change constants of the decoder."""
    model.decoder.config = replace(model.decoder.config, **changes)


def of_features(model: VisionLanguageModel, path: str, value: float) -> None:
    """Lose a parameter of all mergers that make features."""
    for merger in model.vision.deepstack:
        module, name = path.split(".")
        set_to(getattr(getattr(merger, module), name), value)


class TestQwen3VL(QwenContract):
    parts: ClassVar = {
        "two images with text between": [[4, (4, 14), 7, (8, 6), 9]],
        "ragged": [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13], [1, (12, 18), 6]],
    }
    batches: ClassVar = ("ragged",)
    reduced: ClassVar = [("ragged", BOTH)]
    mutations: ClassVar = {
        "sections_one_after_another": lambda model: with_decoder(model, rope_interleaved=False),
        "time_everywhere": lambda model: with_decoder(model, rope_sections=(7, 0, 0)),
        "lost_query_norm": lambda model: set_to(model.decoder.layers.attention.q_norm.scale, 1),
        "lost_key_norm": lambda model: set_to(model.decoder.layers.attention.k_norm.scale, 1),
        "swapped_query_and_key_norm": lambda model: swap(
            model.decoder.layers.attention.q_norm.scale, model.decoder.layers.attention.k_norm.scale
        ),
        "features_in_another_order": lambda model: swap(
            model.vision.deepstack[0].fc2.kernel, model.vision.deepstack[1].fc2.kernel
        ),
        "lost_features": lambda model: of_features(model, "fc2.kernel", 0),
        "dropped_feature_bias": lambda model: of_features(model, "fc2.bias", 0),
        "lost_feature_norm": lambda model: of_features(model, "norm.scale", 1),
        "lost_positions": lambda model: set_to(model.vision.position_embedding, 0),
        "dropped_patch_bias": lambda model: set_to(model.vision.patch_embed.bias, 0),
        "lost_merger_norm": lambda model: set_to(model.vision.merger.norm.scale, 1),
        "swapped_vision_norms": lambda model: swap(model.vision.layers.attention_norm.scale, model.vision.layers.mlp_norm.scale),
    }
    mutated: ClassVar = "two images with text between"

    @torch.no_grad()
    def test_vision_tower_and_merger(self, pair: Pair, batch: str) -> None:
        """The last states, the embeddings of the visual tokens, and the feature of each of them for each layer."""
        examples = self.examples(pair, batch)
        inputs, images = hf_inputs(examples), our_images(examples, pair.config)
        theirs = pair.theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
        features, tokens = run_tower(pair.ours, images)
        group, counts = pair.config.vision.merge_size**2, images.num_patches.tolist()
        last = np.concatenate([row[:n] for row, n in zip(features[-1], counts, strict=True)])
        assert_close(last, theirs.last_hidden_state, SIMPLE)
        tokens = np.concatenate([row[: n // group] for row, n in zip(tokens, counts, strict=True)])
        embedding, *added = np.split(tokens, 1 + len(DEEPSTACK), axis=1)
        assert_close(embedding, theirs.pooler_output, SIMPLE)
        for ours, expected in zip(added, theirs.deepstack_features, strict=True):
            assert_close(ours, expected, SIMPLE)

    def test_features_are_added_after_reduced_layers_too(self, pair: Pair) -> None:
        """The readable pass, whose layers all are reduced, against PyTorch; without the features, it is far away."""
        (example,) = self.examples(pair, self.mutated)
        everywhere = Plan(attention=range(5), ffn=range(5))
        (theirs,) = self.theirs_reduced(pair, [example], everywhere)
        images = [
            PreparedImage(
                (patches, patch_places(grid, 2), np.array(len(patches), np.int32)), ImageTokens(len(patches) // 4, grid)
            )
            for patches, grid in zip(example.patches, example.grids, strict=True)
        ]
        arguments = [images], [prompt_of(example, pair.config)], everywhere, self.reduction
        assert_close(forward(pair.ours, *arguments)[0], theirs, WHOLE)
        model = nnx.clone(pair.ours)
        of_features(model, "fc2.kernel", 0)
        of_features(model, "fc2.bias", 0)
        assert error(forward(model, *arguments)[0], theirs) > 100 * WHOLE


def test_logits_of_a_model_with_tied_head_and_one_kv_head(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, tiny_qwen3_vl(3, tie_word_embeddings=True, num_key_value_heads=1, num_hidden_layers=4))
    assert pair.config.decoder.tied_head
    examples = [make_example(1, [3, (6, 10), 5], pair.config)]
    (ours,), (theirs,) = TestQwen3VL().ours(pair.ours, pair, examples, DENSE, TestQwen3VL.reduction), their_logits(pair, examples)
    assert_close(ours, theirs, WHOLE)


def test_every_norm_has_its_own_eps(pair: Pair) -> None:
    """Logits do not show it."""
    vision, theirs = pair.ours.vision, pair.theirs.model.visual
    ours = [vision.layers.attention_norm, vision.layers.mlp_norm, vision.merger.norm, vision.deepstack[0].norm]
    block, merger = theirs.blocks[0], theirs.deepstack_merger_list[0]
    assert [norm.eps for norm in ours] == [norm.eps for norm in (block.norm1, block.norm2, theirs.merger.norm, merger.norm)]
    attention = pair.ours.decoder.layers.attention
    assert attention.q_norm.eps == attention.k_norm.eps == pair.theirs.config.text_config.rms_norm_eps


@pytest.mark.parametrize("grid", [(2, 2), (6, 10), (48, 48), (50, 130)])
def test_positions_are_interpolated_as_in_transformers(grid: tuple[int, int]) -> None:
    """The corners of the table lie on the corners of the image."""
    table = np.random.default_rng(0).standard_normal((2304, 3)).astype(np.float32)
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), 48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = (torch.tensor(table)[indices] * weights[:, :, None]).sum(1)
    places = np.concatenate([patch_places(grid, 2), np.full((4, 2), 9999, np.int32)])
    is_patch = np.arange(len(places)) < grid[0] * grid[1]
    ours = jax.jit(interpolated, static_argnums=3)(jnp.asarray(table), jnp.asarray(places)[None], jnp.asarray(is_patch)[None], 48)
    assert_close(ours[0, : len(places) - 4], expected, SIMPLE)


@pytest.mark.parametrize(
    ("size", "tokens"), [((1080, 1920), 2040), ((480, 640), 300), ((100, 100), 64), ((30, 600), 72), ((5000, 5000), 16384)]
)
def test_visual_tokens_by_height_and_width(size: tuple[int, int], tokens: int, tmp_path: Path) -> None:
    measured, found = kind_of("qwen3_vl").measure(tmp_path, {})(*size[::-1])
    assert (measured, found.count) == ((4 * tokens,), tokens)


def test_videos_are_refused(pair: Pair) -> None:
    inputs = {name: tensor.numpy() for name, tensor in hf_inputs([make_example(1, [3, (6, 10), 5], pair.config)]).items()}
    video = inputs | {"input_ids": np.where(inputs["input_ids"] == 195, 196, inputs["input_ids"])}
    with pytest.raises(UserError, match=r"^bundle: input_ids has video tokens; only images are supported$"):
        kind_of("qwen3_vl").family.reference.read("bundle", video, pair.config, Path())


def test_a_config_without_deepstack_has_no_features() -> None:
    fields = kind_of("qwen3_vl").fields
    config = read_kind(
        {**fields, "vision_config": fields["vision_config"] | {"deepstack_visual_indexes": []}}, "config.json"
    ).config
    assert (config.decoder.deepstack, config.decoder.visual_width) == (0, 4096)
