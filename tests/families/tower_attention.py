"""The attention in the vision towers of Hugging Face's tiny models, as marks of visual tokens: computed from whole matrices.

Each function returns what the visual tokens of one example's images receive, [P], and their keys [P, H].
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

Seen = list[tuple[Tensor, Tensor]]
"""Weights [I, N, S, S] and keys [I, N, S, H] of each call."""


@contextmanager
def attention_before_last(tower: torch.nn.Module, back: int = 2) -> Iterator[Seen]:
    """What the attention of the block before the last computes while the block runs (`back` counts blocks from the end)."""
    target = [module for module in tower.modules() if type(module).__name__.endswith("Attention")][-back]
    file, seen = sys.modules[type(target).__module__], []
    plain = file.eager_attention_forward

    def recording(module: torch.nn.Module, query: Tensor, key: Tensor, *others: Any, **options: Any) -> Any:
        result = plain(module, query, key, *others, **options)
        if module is target:
            seen.append((result[1], key))
        return result

    file.eager_attention_forward = recording
    try:
        yield seen
    finally:
        file.eager_attention_forward = plain


def by_class_token(seen: Seen) -> Tensor:
    """Marks [I, J, 1 + H]: the class token's attention to each patch, and the patch's key; means over heads."""
    ((weights, keys),) = seen
    return torch.cat([weights.mean(dim=1)[:, 0, 1:, None], keys.mean(dim=1)[:, 1:]], dim=-1)


def by_patches(seen: Seen) -> Tensor:
    """Marks [I, J, 1 + H]: the attention that each patch receives, mean over heads and queries, and its key."""
    ((weights, keys),) = seen
    return torch.cat([weights.mean(dim=(1, 2))[..., None], keys.mean(dim=1)], dim=-1)


@torch.no_grad()
def llava(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attention_before_last(theirs.model.vision_tower) as seen:
        theirs.model.get_image_features(pixel_values=inputs["pixel_values"])
    return by_class_token(seen).flatten(0, 1)


@torch.no_grad()
def llava_next(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attention_before_last(theirs.model.vision_tower) as seen:
        theirs.model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    marks = by_class_token(seen)
    (packed,), _ = theirs.model.pack_image_features([marks], inputs["image_sizes"], "default", torch.zeros(marks.shape[-1]))
    return packed


@torch.no_grad()
def llava_onevision(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attention_before_last(theirs.model.vision_tower) as seen:
        theirs.model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    marks = by_patches(seen)
    ratio = theirs.config.vision_aspect_ratio
    (packed,), _ = theirs.model.pack_image_features([marks], inputs["image_sizes"], torch.zeros(marks.shape[-1]), ratio)
    return packed


@torch.no_grad()
def internvl(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attention_before_last(theirs.model.vision_tower) as seen:
        theirs.model.get_image_features(inputs["pixel_values"])
    marks = by_class_token(seen)
    side = int(marks.shape[1] ** 0.5)
    grid = marks.unflatten(1, (side // 2, 2, side // 2, 2))
    return grid.mean(dim=(2, 4)).flatten(0, 2)


@torch.no_grad()
def qwen(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    with attention_before_last(theirs.model.visual) as seen:
        theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    images = [by_patches([one])[0] for one in seen]
    return torch.cat(images).unflatten(0, (-1, 4)).mean(dim=1)


@torch.no_grad()
def qwen2_5_vl(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Its layer before the last attends within windows, one call for each."""
    with attention_before_last(theirs.model.visual) as seen:
        theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    count = len(inputs["pixel_values"])
    assert len(seen) > 1
    windows = [torch.cat([w.mean(dim=1)[0].sum(dim=0)[:, None] / count, k.mean(dim=1)[0]], dim=-1) for w, k in seen]
    tower = theirs.model.visual
    order, _ = get_vision_window_index(inputs["image_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return torch.cat(windows).unflatten(0, (-1, 4)).mean(dim=1)[torch.argsort(order)]
