"""A tiny LLaVA-OneVision of Hugging Face, and prompts with textured images in its form and in ours."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from rlens_jax.families.anyres import cut_patches
from rlens_jax.families.llava_onevision.preparer import base_sources, grid_sources
from rlens_jax.models.prompt import Grid as Size
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from tests.families.pair import text_inputs
from tests.sequences import bucket_for
from tests.torch_support import redraw

VIEW, PATCH, SIDE = 14, 4, 3
"""Pixels a side of a view, of a patch, and patches a side: two pixels of a view are cut off, as in the published models."""
PINPOINTS = [[VIEW * rows, VIEW * columns] for rows in range(1, 5) for columns in range(1, 5)]
MOST_TILES = 3
IMAGE_TOKEN, VIDEO_TOKEN = 195, 196


def tiny_llava(seed: int, tie_word_embeddings: bool = False, **text_overrides) -> torch.nn.Module:
    """A LlavaOnevisionForConditionalGeneration of distinct sizes: float32, eager attention, every parameter redrawn."""
    from transformers import LlavaOnevisionConfig as Config
    from transformers import LlavaOnevisionForConditionalGeneration

    text = {
        "model_type": "qwen2",
        "hidden_size": 60,
        "intermediate_size": 77,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 199,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": 190,
        "eos_token_id": 191,
        "pad_token_id": 190,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": VIEW,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    config = Config(
        text_config=text | text_overrides,
        vision_config=vision,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        tie_word_embeddings=tie_word_embeddings,
        attn_implementation="eager",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    redraw(model, seed)
    return model.eval()


def picture(seed: int, size: Size) -> Image.Image:
    """An RGB image of this height and width: waves, an edge and noise."""
    rng, (height, width) = np.random.default_rng(seed), size
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    channels = []
    for _ in range(3):
        a, b, phase = rng.uniform(-4, 4, 3)
        wave = np.sin(2 * np.pi * (a * x + b * y + phase)) + (x > rng.uniform(0.2, 0.8))
        channels.append(127 + 50 * wave + 20 * rng.standard_normal(wave.shape))
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def image_processor():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(
        size={"height": VIEW, "width": VIEW},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.25, 0.125],
    )


def best_tiles(size: Size) -> Size:
    """Rows and columns of tiles of an image of this size, by Hugging Face."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, PINPOINTS)
    return height // VIEW, width // VIEW


@dataclass(frozen=True)
class Example:
    """One sample: token ids [T], where images are, and for each one its size, pixels and places in the table."""

    token_ids: np.ndarray
    is_visual: np.ndarray
    sizes: list[Size] = field(default_factory=list)
    views: list[np.ndarray] = field(default_factory=list)
    """[W, 3, VIEW, VIEW]: the base view, and unless there are several images the tiles."""
    placed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def cut(self, length: int) -> "Example":
        """The first `length` tokens, which must hold all images."""
        return Example(self.token_ids[:length], self.is_visual[:length], self.sizes, self.views, self.placed)


def place(size: Size, alone: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sources and weights of an image's visual tokens."""
    sources, weights = base_sources(SIDE)
    if alone:
        more = grid_sources(size, best_tiles(size), SIDE, MOST_TILES)
    else:
        more = np.zeros((1, 4), np.int32), np.array([[1, 0, 0, 0]], np.float32)
    return np.concatenate([sources, more[0]]), np.concatenate([weights, more[1]])


def make_example(seed: int, parts: Sequence[int | Size]) -> Example:
    """A sample of alternating parts: a number of random text tokens, or an image's height and width in pixels."""
    rng = np.random.default_rng(seed)
    sizes = [part for part in parts if not isinstance(part, int)]
    placed = [place(size, alone=len(sizes) == 1) for size in sizes]
    views = []
    if sizes:
        pictures = [picture(seed * 100 + number, size) for number, size in enumerate(sizes)]
        views = list(image_processor()(images=[pictures], return_tensors="np")["pixel_values"])
    images, ids = iter(placed), []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, 190, part).tolist()
        else:
            ids += [IMAGE_TOKEN] * len(next(images)[0])
    token_ids = np.array(ids, np.int32)
    return Example(token_ids, token_ids == IMAGE_TOKEN, sizes, views, placed)


def hf_inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Keyword arguments of Hugging Face's model: a right-padded batch."""
    inputs = text_inputs(examples)
    views = [views for example in examples for views in example.views]
    if views:
        most = max(map(len, views))
        stacked = np.stack([np.pad(v, ((0, most - len(v)), (0, 0), (0, 0), (0, 0))) for v in views])
        inputs["pixel_values"] = torch.tensor(stacked.astype(np.float32))
        inputs["image_sizes"] = torch.tensor([size for example in examples for size in example.sizes])
        inputs["batch_num_images"] = torch.tensor([len(e.sizes) for e in examples if e.sizes])
    return inputs


@dataclass(frozen=True)
class Images:
    """All images of a batch as the vision module reads them, and where its visual tokens are among theirs."""

    arrays: tuple[jax.Array, jax.Array, jax.Array]
    source: jax.Array
    """int32 [B, P]: index into the flattened visual tokens [I * Z]; padding points at a real one."""


def our_images(examples: Sequence[Example], spare: int = 0) -> Images:
    """The images, padded: views hold huge values where there are none; `spare` visual slots more than needed."""
    flat = [pair for example in examples for pair in zip(example.views, example.placed, strict=True)]
    flat = flat or [(np.zeros((1, 3, VIEW, VIEW), np.float32), base_sources(SIDE))]
    count, slots = max(len(v) for v, _ in flat) + 2, max(len(p[0]) for _, p in flat) + 5
    views = np.full((len(flat), count, SIDE**2, 3 * PATCH**2), 1e3, np.float32)
    sources, weights = np.zeros((len(flat), slots, 4), np.int32), np.zeros((len(flat), slots, 4), np.float32)
    for i, (pixels, (rows, shares)) in enumerate(flat):
        views[i, : len(pixels)] = cut_patches(pixels, PATCH)
        sources[i, : len(rows)], weights[i, : len(rows)] = rows, shares
    source = np.zeros((len(examples), max(int(e.is_visual.sum()) for e in examples) + spare), np.int32)
    image = 0
    for row, example in enumerate(examples):
        tokens = [np.zeros(0, np.int32)]
        for rows, _ in example.placed:
            tokens.append(image * slots + np.arange(len(rows)))
            image += 1
        joined = np.concatenate(tokens)
        source[row, : len(joined)] = joined
    return Images((jnp.asarray(views), jnp.asarray(sources), jnp.asarray(weights)), jnp.asarray(source))


def our_batch(examples: Sequence[Example], spare: tuple[int, int] = (0, 0)) -> PromptBatch:
    """The prompts as the decoder reads them."""
    prompts = []
    for example in examples:
        positions = np.arange(len(example.token_ids), dtype=np.int32)[None]
        prompts.append(Prompt(example.token_ids, example.is_visual, positions, positions.shape[1], 0))
    bucket = bucket_for([example.is_visual for example in examples], spare)
    return jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, 1))


def patches_of(examples: Sequence[Example]) -> np.ndarray:
    """All views of all images, without padding, as patches [W, J, C]."""
    return cut_patches(np.concatenate([v for e in examples for v in e.views]), PATCH).astype(np.float32)
