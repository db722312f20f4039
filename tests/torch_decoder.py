"""A decoder with token pruning in plain PyTorch, written from the methods' descriptions and not from this package's code.

One sample at a time, in sequence order, whole masks, all attention weights formed, nothing cached. Reductions are those of
tests/torch_reductions.py.

Axis letters: T tokens of a sample, D width, N query heads, K kv heads, H head dim, V vocabulary.
"""

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import torch
from torch import Tensor

from tests.torch_reductions import dynamic_ffn, hollow_mask


@dataclass(frozen=True)
class Settings:
    """How a pass is reduced and pruned: layers counted from 0; tokens are dropped after `after` layers."""

    attention_layers: tuple[int, ...] = ()
    ffn_layers: tuple[int, ...] = ()
    attention_range: int = 256
    active_fraction: str = "0.2"
    probe_fraction: str = "0.1"
    after: int | None = None
    drop: str | None = None
    """Share of the visual tokens that is dropped; None drops them all."""


@dataclass
class Pass:
    """What is left of a sample after all layers."""

    logits: Tensor
    """[survivors, V]"""
    positions: list[int]
    """Where the survivors were in the sequence."""
    gap: float
    """How far apart the scores of the last kept and the first dropped token are, relative to the former."""


class TorchDecoder:
    """The weights of one of our decoders, by name, and what its config says."""

    def __init__(self, weights: dict[str, np.ndarray], config):
        self.weights = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        self.config = config

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["embedding"][ids]

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        is_visual: Tensor,
        rope: Tensor,
        last_prompt_token: int,
        settings: Settings,
        features: Tensor | None = None,
    ) -> Pass:
        """x [T, D] embeddings, rope [T, axes] rotary positions, features [T, layers, D] of deepstack."""
        positions, gap, attended = torch.arange(len(x)), float("inf"), [torch.empty(0)]
        for layer in range(self.config.num_layers):
            if layer == settings.after:
                query = positions.tolist().index(last_prompt_token)
                kept, gap = survivors(attended[-1], is_visual, query, settings.drop)
                x, is_visual, rope, positions = x[kept], is_visual[kept], rope[kept], positions[kept]
                features = None if features is None else features[kept]
            x, weights = self.layer(x, layer, is_visual, rope, settings)
            if features is not None and layer < features.shape[1]:
                x[is_visual] += features[is_visual, layer]
            attended.append(weights)
        head = "embedding" if self.config.tied_head else "head"
        logits = self.rms_norm(x, self.weights["norm.scale"]) @ self.weights[head].T
        return Pass(logits, positions.tolist(), gap)

    def layer(self, x: Tensor, layer: int, is_visual: Tensor, rope: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """States after the layer, and its attention weights [N, T, T]."""
        w = {name.removeprefix("layers."): value[layer] for name, value in self.weights.items() if name.startswith("layers.")}
        y = self.rms_norm(x, w["input_norm.scale"])
        q, k, v = (torch.einsum("td,dnh->nth", y, w[f"attention.{name}.kernel"]) for name in ("q_proj", "k_proj", "v_proj"))
        if self.config.qkv_bias:
            q, k, v = (x + w[f"attention.{name}.bias"][:, None] for x, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")))
        if self.config.qk_norm:
            q, k = self.rms_norm(q, w["attention.q_norm.scale"]), self.rms_norm(k, w["attention.k_norm.scale"])
        q, k = self.turn(q, rope), self.turn(k, rope)
        k, v = (heads.repeat_interleave(len(q) // len(k), dim=0) for heads in (k, v))
        reach = settings.attention_range if layer in settings.attention_layers else None
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~hollow_mask(is_visual, reach), -torch.inf).softmax(dim=-1)
        x = x + torch.einsum("nth,nhd->td", weights @ v, w["attention.o_proj.kernel"])
        y = self.rms_norm(x, w["ffn_norm.scale"])
        gate, up, down = (w[f"ffn.{name}_proj.kernel"] for name in ("gate", "up", "down"))
        if layer in settings.ffn_layers:
            y, _ = dynamic_ffn(y, gate, up, down.T, is_visual, settings.active_fraction, settings.probe_fraction)
        else:
            y = (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down
        return x + y, weights

    def greedy(
        self,
        x: Tensor,
        is_visual: Tensor,
        rope: Tensor,
        next_rope: int,
        count: int,
        settings: Settings,
        features: Tensor | None = None,
    ) -> list[int]:
        """The tokens after a prompt, each by a pass over everything so far."""
        last, tokens = len(x) - 1, []
        for step in range(count):
            tokens.append(int(self(x, is_visual, rope, last, settings, features).logits[-1].argmax()))
            x = torch.cat([x, self.embed(torch.tensor(tokens[-1:]))])
            is_visual = torch.cat([is_visual, torch.tensor([False])])
            rope = torch.cat([rope, torch.full((1, rope.shape[1]), next_rope + step)])
            if features is not None:
                features = torch.cat([features, torch.full_like(features[:1], torch.nan)])
        return tokens

    def rms_norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.config.norm_eps) * scale

    def turn(self, x: Tensor, rope: Tensor) -> Tensor:
        """Heads [N, T, H], rotated by half."""
        sections = self.config.rope_sections
        half = sum(sections)
        frequency = self.config.rope_theta ** -(torch.arange(half) / half)
        axis = [i for i, count in enumerate(sections) for _ in range(count)]
        if self.config.rope_interleaved:
            axis = [i % len(sections) if i < len(sections) * sections[i % len(sections)] else 0 for i in range(half)]
        angle = rope[:, axis] * frequency
        x1, x2 = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def survivors(weights: Tensor, is_visual: Tensor, query: int, drop: str | None) -> tuple[list[int], float]:
    """Tokens that are left when visual tokens are dropped by the attention [N, T, T] that `query` pays them."""
    text, visual = (torch.nonzero(mask)[:, 0].tolist() for mask in (~is_visual, is_visual))
    if drop is None or not visual:
        return text, float("inf")
    received = weights.mean(dim=0)[query]
    count = max(1, int((len(visual) * (1 - Decimal(drop))).to_integral_value(ROUND_FLOOR)))
    ranked = sorted(visual, key=lambda token: -float(received[token]))
    gap = float("inf")
    if count < len(visual):
        gap = float(1 - received[ranked[count]] / received[ranked[count - 1]])
    return sorted(text + ranked[:count]), gap
