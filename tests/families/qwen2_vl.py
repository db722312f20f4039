"""Prompts with textured images, in the form that Hugging Face's Qwen2-VL reads and in ours."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.qwen2_vl.preparer import patch_places, rope_positions
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from tests.families.pair import text_inputs
from tests.sequences import bucket_for

Grid = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One sample: token ids [T], where images are, and each one's grid and patches [J, C] in merge order."""

    token_ids: np.ndarray
    is_visual: np.ndarray
    grids: list[Grid]
    patches: list[np.ndarray]

    def cut(self, length: int) -> "Example":
        """The first `length` tokens, which must hold all images."""
        return Example(self.token_ids[:length], self.is_visual[:length], self.grids, self.patches)


def texture(rng: np.random.Generator, rows: int, columns: int, patch: int) -> np.ndarray:
    """Waves, an edge and noise, different in both frames: float32 [2, 3, rows * patch, columns * patch]."""
    y, x = np.meshgrid(np.linspace(0, 1, rows * patch), np.linspace(0, 1, columns * patch), indexing="ij")
    image = np.zeros((2, 3, *y.shape))
    for channel in np.ndindex(2, 3):
        for frequency in (1, 3, 7):
            a, b, phase = rng.uniform(-frequency, frequency, 3)
            image[channel] += np.sin(2 * np.pi * (a * x + b * y + phase)) / frequency
        image[channel] += x > rng.uniform(0.2, 0.8)
    return (image + 0.3 * rng.standard_normal(image.shape)).astype(np.float32)


def cut_patches(image: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """[2, 3, h, w] to [J, C]: patches in merge order, each as channel, frame, row, column."""
    rows, columns = (side // patch for side in image.shape[2:])
    blocks = image.reshape(2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    return blocks.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)


def make_example(seed: int, parts: Sequence[int | Grid], config: Qwen2VLConfig) -> Example:
    """A sample of alternating parts: a number of random text tokens, or an image's grid of patches."""
    rng, vision = np.random.default_rng(seed), config.vision
    ids, grids, patches = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, config.image_token - 5, part).tolist()
        else:
            ids += [config.image_token] * (part[0] * part[1] // vision.merge_size**2)
            grids.append(part)
            patches.append(cut_patches(texture(rng, *part, vision.patch_size), vision.patch_size, vision.merge_size))
    token_ids = np.array(ids, np.int32)
    return Example(token_ids, token_ids == config.image_token, grids, patches)


def hf_inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Keyword arguments of Hugging Face's model: a right-padded batch."""
    inputs = text_inputs(examples, mm_token_type_ids=[e.is_visual for e in examples])
    grids = [(1, *grid) for example in examples for grid in example.grids]
    if grids:
        inputs["pixel_values"] = torch.tensor(np.concatenate([p for e in examples for p in e.patches]))
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


@dataclass(frozen=True)
class Images:
    """All images of a batch, padded, and where its visual tokens are among theirs."""

    patches: jax.Array
    places: jax.Array
    num_patches: jax.Array
    source: jax.Array
    """int32 [B, P]: index into the flattened visual tokens [I * j]; padding points at a real one."""

    @property
    def tower_inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.patches, self.places, self.num_patches


def our_images(examples: Sequence[Example], config: Qwen2VLConfig, spare: int = 0) -> Images:
    """The images as the tower reads them; padding patches hold huge values.

    Args:
        examples: the samples.
        config: of the model.
        spare: visual slots beyond those of the sample with the most visual tokens.
    """
    vision = config.vision
    group = vision.merge_size**2
    flat = [(patches, grid) for e in examples for patches, grid in zip(e.patches, e.grids, strict=True)]
    flat = flat or [(np.zeros((group, vision.sizes["c"]), np.float32), (vision.merge_size, vision.merge_size))]
    slots = max(len(patches) for patches, _ in flat) + 3 * group
    patches = np.full((len(flat), slots, vision.sizes["c"]), 1e3, np.float32)
    places = np.zeros((len(flat), slots, 2), np.int32)
    for i, (values, grid) in enumerate(flat):
        patches[i, : len(values)] = values
        places[i, : len(values)] = patch_places(grid, vision.merge_size)
    source = np.zeros((len(examples), max(int(e.is_visual.sum()) for e in examples) + spare), np.int32)
    image = 0
    for row, example in enumerate(examples):
        own = range(image, image + len(example.grids))
        image += len(own)
        tokens = [i * slots // group + np.arange(len(values) // group) for i, values in zip(own, example.patches, strict=True)]
        tokens = np.concatenate([*tokens, np.zeros(0, np.int32)])
        source[row, : len(tokens)] = tokens
    counts = np.array([len(values) for values, _ in flat], np.int32)
    return Images(*(jnp.asarray(x) for x in (patches, places, counts, source)))


def prompt_of(example: Example, config: Qwen2VLConfig) -> Prompt:
    """The prompt as the decoder reads it."""
    positions, following = rope_positions(example.is_visual, example.grids, config.vision.merge_size)
    return Prompt(example.token_ids, example.is_visual, positions, following, 0)


def our_batch(examples: Sequence[Example], config: Qwen2VLConfig, spare: tuple[int, int] = (0, 0)) -> PromptBatch:
    """The prompts as one batch."""
    prompts = [prompt_of(example, config) for example in examples]
    bucket = bucket_for([example.is_visual for example in examples], spare)
    return jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, 1))
