"""Parity with Hugging Face's LLaVA-1.5 and LLaVA-NeXT in float32, through the real loader: parts, whole, reduced, decoding."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlens_jax.families.llava_next import model as llava_next
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import BOTH, DENSE, PAPER, SIMPLE, WHOLE, ForwardContract, Logits, Mutation, set_to, swap
from tests.families.llava import MAKE, SIDE, Example, hf_inputs, make_example, our_images
from tests.families.operator_settings import EVERY_LEVEL, ONE_LEVEL
from tests.families.pair import Pair, cut, make_pair
from tests.families.prefill import greedy, prefill
from tests.numerics import assert_close, error
from tests.torch_reductions import reduced

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = Reduction(attention_range=5, active_fraction=0.3)
NEW_TOKENS = 40
Parts = list[list[int | tuple[int, int]]]
"""Samples of numbers of text tokens, and images by height and width in pixels."""
RAGGED: Parts = [[3, (20, 33), 5], [2, (11, 14), 1, (30, 9), 3, (13, 13), 11], [13], [1, (61, 47), 6]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = make_pair(tmp_path_factory.mktemp(family), MAKE[family](0))
        return made[family]

    return get


def rolled(parameter: Any, axis: int = 0) -> None:
    parameter[...] = jnp.roll(parameter[...], 1, axis=axis)


def reordered_patches(model: VisionLanguageModel) -> None:
    """Patches as row, column, channel."""
    kernel = model.vision.tower.patch_embed.kernel
    kernel[...] = kernel[...].reshape(3, 16, -1).swapaxes(0, 1).reshape(kernel[...].shape)


def wrong_theta(model: VisionLanguageModel) -> None:
    model.decoder.config = replace(model.decoder.config, rope_theta=1e6)


def wrong_eps(model: VisionLanguageModel) -> None:
    for norm in (model.decoder.norm, model.decoder.layers.input_norm, model.decoder.layers.ffn_norm):
        norm.eps = 1e-6


def wrong_tower_eps(model: VisionLanguageModel) -> None:
    for norm in (model.vision.tower.layers.attention_norm, model.vision.tower.layers.mlp_norm):
        norm.eps = 1e-5


MUTATIONS: Mapping[str, Mutation] = {
    "dropped_tower_bias": lambda model: set_to(model.vision.tower.layers.fc1.bias, 0),
    "dropped_projector_bias": lambda model: set_to(model.vision.projector_fc1.bias, 0),
    "lost_class_token": lambda model: set_to(model.vision.tower.class_embedding, 0),
    "lost_first_norm": lambda model: set_to(model.vision.tower.pre_norm.scale, 1),
    "rolled_positions": lambda model: rolled(model.vision.tower.position_embedding),
    "reordered_patches": reordered_patches,
    "swapped_norms": lambda model: swap(model.decoder.layers.input_norm.scale, model.decoder.layers.ffn_norm.scale),
    "swapped_tower_norms": lambda model: swap(
        model.vision.tower.layers.attention_norm.scale, model.vision.tower.layers.mlp_norm.scale
    ),
}


class LlavaContract(ForwardContract):
    """Both families, which differ in their images and in the attention of their decoders."""

    family: ClassVar[str]
    reduced: ClassVar = [("ragged", BOTH)]
    mutations = MUTATIONS

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, pairs) -> Pair:
        return pairs(cls.family)

    @abstractmethod
    def parts(self, batch: str) -> Parts:
        """Samples of a batch."""

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return [make_example(pair.config, seed, parts) for seed, parts in enumerate(self.parts(batch), 1)]

    def ours(self, model: VisionLanguageModel, pair: Pair, examples: list[Example], plan: Plan, reduction: Reduction) -> Logits:
        return prefill(model, examples, *our_images(pair.config, examples), plan, reduction)[0]

    def theirs(self, pair: Pair, examples: list[Example]) -> Logits:
        with torch.no_grad():
            return cut(pair.theirs(**hf_inputs(examples)).logits, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return Prompt.plain(example.token_ids, example.is_visual)

    def visual(self, pair: Pair, examples: list[Example]) -> list[np.ndarray]:
        arrays, source = our_images(pair.config, examples)
        tokens = np.asarray(jax.jit(pair.ours.vision)(*arrays))
        tokens = tokens.reshape(-1, tokens.shape[-1])[source]
        return [row[: example.is_visual.sum()] for row, example in zip(tokens, examples, strict=True)]

    def test_tower_and_connector(self, pair: Pair) -> None:
        examples = self.examples(pair, "ragged")
        inputs = {name: value for name, value in hf_inputs(examples).items() if name in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            theirs = torch.cat(list(pair.theirs.model.get_image_features(**inputs).pooler_output)).numpy()
            pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])
            tower = pair.theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        views = [views for example in examples for (views, *_) in example.arrays]
        ours = np.concatenate([np.asarray(jax.jit(pair.ours.vision.tower)(v.reshape(-1, SIDE**2, 48))) for v in views[:1]])
        assert tower.std() > 1
        assert_close(ours, tower[: len(ours)], SIMPLE)
        assert_close(np.concatenate(self.visual(pair, examples)), theirs, SIMPLE)

    @pytest.mark.parametrize("wanted", [DENSE, BOTH], ids=Plan.label)
    def test_greedy_tokens_with_two_images(self, pair: Pair, wanted: Plan) -> None:
        example = make_example(pair.config, 3, [4, (20, 33), 7, (40, 15), 9])
        inputs = hf_inputs([example])
        with reduced(pair.theirs, [torch.tensor(example.is_visual)], wanted.attention, wanted.ffn, 5, "0.3", "0.1"):
            generated = pair.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        expected = generated[0, len(example.token_ids) :].tolist()
        assert len(expected) == NEW_TOKENS
        assert len(set(expected)) >= 5
        images = our_images(pair.config, [example])
        (logits,), cache, batch = prefill(pair.ours, [example], *images, wanted, SMALL, NEW_TOKENS)
        assert greedy(pair.ours, logits, cache, batch, NEW_TOKENS) == expected


class TestLlava(LlavaContract):
    family = "llava"
    batches: ClassVar = ["ragged"]
    settings: ClassVar = EVERY_LEVEL | ONE_LEVEL
    mutated = "wide"

    def parts(self, batch: str) -> Parts:
        return {"ragged": RAGGED, "wide": [[3, (20, 33), 5]]}[batch]


class TestLlavaNext(LlavaContract):
    """Grids that are cut on either axis, and of one row of tiles."""

    family = "llava_next"
    batches: ClassVar = ["ragged", "image first"]
    mutated = "wide"
    mutations: ClassVar = {
        **MUTATIONS,
        "wrong_newline": lambda model: rolled(model.vision.image_newline),
        # These are compiled anew.
        "wrong_theta": wrong_theta,
        "wrong_eps": wrong_eps,
        "wrong_tower_eps": wrong_tower_eps,
    }

    def parts(self, batch: str) -> Parts:
        thin = [[2, (2, 120), 3, (50, 17), 2]]
        return {"ragged": RAGGED, "image first": [[(9, 71), 4], *thin], "wide": [[3, (20, 33), 5]]}[batch]

    @pytest.mark.parametrize("wrong", ["newline first", "tile by tile", "grid before the base view"])
    def test_a_wrong_order_misses_by_a_hundred_tolerances(self, pair: Pair, wrong: str) -> None:
        """With the right number of visual tokens, so that only their values tell."""
        (example,) = self.examples(pair, "wide")
        ((views, rows),) = example.arrays
        base, grid = rows[: SIDE**2], rows[SIDE**2 :]
        lines = grid.reshape(-1, 1 + np.flatnonzero(grid == 0)[0])
        orders = {
            "newline first": np.concatenate([base, np.roll(lines, 1, axis=1).reshape(-1)]),
            "tile by tile": np.concatenate([base, np.sort(lines[:, :-1].reshape(-1)).reshape(-1), lines[:, -1]]),
            "grid before the base view": np.concatenate([grid, base]),
        }
        changed = replace(example, arrays=[(views, orders[wrong])])
        (ours,) = self.ours(pair.ours, pair, [changed], DENSE, PAPER)
        (theirs,) = self.theirs(pair, [example])
        assert error(ours, theirs) > 100 * WHOLE

    def test_grids_of_every_size(self, pair: Pair) -> None:
        """Rows against Hugging Face's `pack_image_features` on a picture of coordinates."""
        rng, newline = np.random.default_rng(0), np.array([7, 8], np.float32)
        sizes = [(2, 120), *(tuple(map(int, rng.integers(3, 90, 2))) for _ in range(300))]
        lines = set()
        for size in sizes:
            rows, views = llava_next.image_rows(pair.config, size)
            features = rng.standard_normal((views, SIDE**2, 2)).astype(np.float32)
            (expected,), _ = pair.theirs.model.pack_image_features(
                [torch.tensor(features)], torch.tensor([size]), "default", torch.tensor(newline)
            )
            np.testing.assert_array_equal(np.concatenate([newline[None], features.reshape(-1, 2)])[rows], expected)
            lines.add(int((rows == 0).sum()))
        assert len(lines) > 5
