"""The same weights in PyTorch and here, by way of a checkpoint folder and the real loader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from rlens_jax.checkpoints.checkpoint import load_model
from tests.torch_support import save_tiny


@dataclass(frozen=True)
class Pair:
    """The same weights on both sides."""

    theirs: torch.nn.Module
    config: Any
    """The family's."""
    ours: Any

    @property
    def text_model(self) -> torch.nn.Module:
        return self.theirs.model.language_model


def make_pair(folder: Path, theirs: torch.nn.Module, save: Callable[..., Any] = save_tiny) -> Pair:
    """Saves their model and loads it."""
    save(folder, theirs)
    kind, ours = load_model(folder, jnp.float32)
    return Pair(theirs, kind.config, ours)


def cut(padded: torch.Tensor, examples: Sequence[Any]) -> list[np.ndarray]:
    """Hugging Face's right-padded rows without padding."""
    return [row[: len(example.token_ids)].numpy() for row, example in zip(padded, examples, strict=True)]


def text_inputs(examples: Sequence[Any], **rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Keyword arguments of Hugging Face's models for right-padded text, and further `rows` padded alike."""
    length = max(len(example.token_ids) for example in examples)
    rows = {"input_ids": [e.token_ids for e in examples], "attention_mask": [np.ones(len(e.token_ids)) for e in examples], **rows}
    return {
        name: torch.tensor(np.stack([np.pad(row, (0, length - len(row))) for row in given]).astype(np.int64))
        for name, given in rows.items()
    }
