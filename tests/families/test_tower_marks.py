"""Marks of visual tokens by the attention in the tower, against Hugging Face's, for every family that has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests.families import internvl, llava, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl, tower_attention
from tests.families.contract import SIMPLE
from tests.families.pair import make_pair
from tests.numerics import assert_close
from tests.torch_support import tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@dataclass(frozen=True)
class Towers:
    """How a family's tiny model, examples of one image, and both sides' inputs are made."""

    model: Callable[[int], Any]
    example: Callable[[Any, int, Any], Any]
    images: tuple[Any, Any]
    arrays: Callable[[Any, Any], tuple[Any, Any]]
    """From config and examples: the tower's arrays, and the index of each visual slot into its tokens."""
    inputs: Callable[[Any], Any]
    marks: Callable[[Any, Any], Any]


def qwen_arrays(config: Any, examples: Any) -> tuple[Any, Any]:
    images = qwen2_vl.our_images(examples, config)
    return images.tower_inputs, images.source


def onevision_arrays(config: Any, examples: Any) -> tuple[Any, Any]:
    images = llava_onevision.our_images(examples)
    return images.arrays, images.source


def internvl_arrays(config: Any, examples: Any) -> tuple[Any, Any]:
    patches, source = internvl.our_images(examples, config)
    return (patches,), source


def qwen(model: Callable[[int], Any], marks: Callable[[Any, Any], Any]) -> Towers:
    def example(config: Any, seed: int, image: Any) -> Any:
        return qwen2_vl.make_example(seed, [2, image, 3], config)

    return Towers(model, example, ((6, 10), (8, 4)), qwen_arrays, qwen2_vl.hf_inputs, marks)


def llava_towers(name: str) -> Towers:
    def example(config: Any, seed: int, image: Any) -> Any:
        return llava.make_example(config, seed, [2, image, 3])

    return Towers(
        llava.MAKE[name], example, ((20, 33), (61, 30)), llava.our_images, llava.hf_inputs, getattr(tower_attention, name)
    )


FAMILIES = {
    "llava": llava_towers("llava"),
    "llava_next": llava_towers("llava_next"),
    "llava_onevision": Towers(
        llava_onevision.tiny_llava,
        lambda config, seed, image: llava_onevision.make_example(seed, [2, image, 3]),
        ((20, 33), (61, 47)),
        onevision_arrays,
        llava_onevision.hf_inputs,
        tower_attention.llava_onevision,
    ),
    "internvl": Towers(
        lambda seed: internvl.tiny_internvl(seed, vision=internvl.SIX_B),
        lambda config, seed, image: internvl.make_example(seed, [2, image, 3]),
        ((40, 90), (16, 16)),
        internvl_arrays,
        internvl.hf_inputs,
        tower_attention.internvl,
    ),
    "qwen2_vl": qwen(tiny_qwen2_vl, tower_attention.qwen),
    "qwen2_5_vl": qwen(qwen2_5_vl.tiny_qwen2_5_vl, tower_attention.qwen2_5_vl),
    "qwen3_vl": qwen(qwen3_vl.tiny_qwen3_vl, tower_attention.qwen),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_are_those_of_whole_matrices(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of different sizes in one padded batch; the tokens before the marks are the plain ones."""
    monkeypatch.setattr(qwen2_5_vl, "FULL_LAYERS", [1])  # so that the layer before the last has windows
    towers = FAMILIES[name]
    pair = make_pair(tmp_path, towers.model(0))
    examples = [towers.example(pair.config, seed, image) for seed, image in enumerate(towers.images, 1)]
    arrays, source = towers.arrays(pair.config, examples)
    vision = nnx.split(pair.ours.vision)

    @jax.jit
    def both(arrays: Any) -> tuple[jax.Array, jax.Array]:
        module = nnx.merge(*vision)
        return module(*arrays), module.marked(*arrays)

    plain, marked = (np.asarray(x).reshape(-1, x.shape[-1])[source] for x in both(arrays))
    width = plain.shape[-1]
    for row, example in enumerate(examples):
        count = int(example.is_visual.sum())
        assert_close(marked[row, :count, :width], plain[row, :count], SIMPLE)
        expected = towers.marks(pair.theirs, towers.inputs([example])).numpy()
        assert expected[:, 0].std() > 1e-3
        assert_close(marked[row, :count, width:], expected, SIMPLE)
