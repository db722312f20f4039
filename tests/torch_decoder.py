"""A decoder with token pruning in plain PyTorch, written from the methods' descriptions and not from this package's code.

One sample at a time, in sequence order, whole masks, all attention weights formed, nothing cached. Reductions are those of
tests/torch_reductions.py.

Axis letters: T tokens of a sample, D width, N query heads, K kv heads, H head dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.torch_reductions import Left, best_visual, dynamic_ffn, hollow_mask, rating_text, recycled, unlike_pivots


@dataclass(frozen=True)
class Here:
    """A sample where tokens are dropped, after some layers."""

    decoder: "TorchDecoder"
    layer: int
    embedded: Tensor
    """The states that entered the first layer, of all tokens [T before any drop, D]."""
    was_visual: Tensor
    positions: Tensor
    """Where the tokens that are left were in the sequence."""
    prompt: int
    """Number of tokens of the whole prompt, without answers."""
    entering: Tensor
    """The states that entered the last layer."""
    x: Tensor
    weights: Tensor
    """The last layer's attention weights [N, T, T]."""
    is_visual: Tensor
    rope: Tensor
    features: Tensor | None
    """Of deepstack, [T, layers, D]."""

    def place(self, token: int) -> int:
        """Where a token of the whole sequence is now."""
        return self.positions.tolist().index(token)


Drop = Callable[[Here, int], Left]
"""From a sample and how many visual tokens it had at first to what is left."""


@dataclass(frozen=True)
class Settings:
    """How a pass is reduced and pruned: layers counted from 0; `drops` by the number of layers before each."""

    attention_layers: tuple[int, ...] = ()
    ffn_layers: tuple[int, ...] = ()
    attention_range: int = 256
    active_fraction: str = "0.2"
    probe_fraction: str = "0.1"
    drops: tuple[tuple[int, Drop], ...] = ()
    renumbered: bool = False
    """Whether rotary positions are numbered anew at each drop."""


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
        positions, gap, prompt, drops = torch.arange(len(x)), float("inf"), last_prompt_token + 1, dict(settings.drops)
        embedded, was_visual, entering, weights = x, is_visual, x, torch.empty(0)
        for layer in range(self.config.num_layers):
            if layer in drops:
                here = Here(self, layer, embedded, was_visual, positions, prompt, entering, x, weights, is_visual, rope, features)
                left = drops[layer](here, int(was_visual.sum()))
                gap, kept = min(gap, left.gap), left.tokens
                if left.states is not None:
                    x, merged = left.states.split([x.shape[1], left.states.shape[1] - x.shape[1]], dim=1)
                    features = None if features is None else merged.unflatten(1, features.shape[1:])
                x = x[kept]
                is_visual, positions = is_visual[kept], positions[kept]
                rope = torch.arange(len(kept))[:, None].float() if settings.renumbered else rope[kept]
                features = None if features is None else features[kept]
            entering = x
            x, weights = self.layer(x, layer, is_visual, rope, settings)
            if features is not None and layer < features.shape[1]:
                x[is_visual] += features[is_visual, layer]
        head = "embedding" if self.config.tied_head else "head"
        logits = self.rms_norm(x, self.weights["norm.scale"]) @ self.weights[head].T
        return Pass(logits, positions.tolist(), gap)

    def layer(self, x: Tensor, layer: int, is_visual: Tensor, rope: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """States after the layer, and its attention weights [N, T, T]."""
        q, k, v = self.heads(x, layer, rope)
        k, v = (heads.repeat_interleave(len(q) // len(k), dim=0) for heads in (k, v))
        reach = settings.attention_range if layer in settings.attention_layers else None
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~hollow_mask(is_visual, reach), -torch.inf).softmax(dim=-1)
        w = self.layer_weights(layer)
        x = x + torch.einsum("nth,nhd->td", weights @ v, w["attention.o_proj.kernel"])
        y = self.rms_norm(x, w["ffn_norm.scale"])
        gate, up, down = (w[f"ffn.{name}_proj.kernel"] for name in ("gate", "up", "down"))
        if layer in settings.ffn_layers:
            y, _ = dynamic_ffn(y, gate, up, down.T, is_visual, settings.active_fraction, settings.probe_fraction)
        else:
            y = (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down
        return x + y, weights

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        return {name.removeprefix("layers."): value[layer] for name, value in self.weights.items() if name.startswith("layers.")}

    def heads(self, x: Tensor, layer: int, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, T, H] and keys [K, T, H], and values, of a layer that `x` enters."""
        w = self.layer_weights(layer)
        y = self.rms_norm(x, w["input_norm.scale"])
        q, k, v = (torch.einsum("td,dnh->nth", y, w[f"attention.{name}.kernel"]) for name in ("q_proj", "k_proj", "v_proj"))
        if self.config.qkv_bias:
            q, k, v = (x + w[f"attention.{name}.bias"][:, None] for x, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")))
        if self.config.qk_norm:
            q, k = self.rms_norm(q, w["attention.q_norm.scale"]), self.rms_norm(k, w["attention.k_norm.scale"])
        return self.turn(q, rope), self.turn(k, rope), v

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


def withdraw(here: Here, num_visual: int) -> Left:
    """VTW."""
    return Left(torch.nonzero(~here.is_visual)[:, 0].tolist(), float("inf"))


def fastv(kept: Callable[[int], int], everyone: bool = False) -> Drop:
    """By the weights of the last layer, of the prompt's last token or of `everyone` in the prompt."""

    def drop(here: Here, num_visual: int) -> Left:
        last = here.place(here.prompt - 1)
        rows = slice(0 if everyone else last, last + 1)
        return best_visual(here.weights.mean(dim=0)[rows].mean(dim=0), here.is_visual, kept(num_visual))

    return drop


def pyramid(kept: Callable[[int], int]) -> Drop:
    """By the last token's query and all keys of the layer that follows."""

    def drop(here: Here, num_visual: int) -> Left:
        q, k, _ = here.decoder.heads(here.x, here.layer, here.rope)
        last, k = here.place(here.prompt - 1), k.repeat_interleave(len(q) // len(k), dim=0)
        scores = torch.zeros(len(here.x))
        scores[: last + 1] = (k[:, : last + 1] @ q[:, last, :, None] / q.shape[-1] ** 0.5)[..., 0].softmax(dim=1).mean(dim=0)
        return best_visual(scores, here.is_visual, kept(num_visual))

    return drop


def sparse(chosen: Callable[[int], int], merges: bool) -> Drop:
    """By the weights that the raters give, over all heads."""

    def drop(here: Here, num_visual: int) -> Left:
        raters = [here.place(token) for token in rating_text(here.embedded, here.was_visual, here.prompt)]
        scores = here.weights.mean(dim=0)[raters].mean(dim=0)
        left = best_visual(scores, here.is_visual, chosen(num_visual))
        states = here.x if here.features is None else torch.cat([here.x, here.features.flatten(1)], dim=1)
        return recycled(left, scores, states, here.is_visual, here.x.shape[1]) if merges else left

    return drop


def dart(kept: Callable[[int], int]) -> Drop:
    """Least like pivots, by the keys of the last layer and the states behind the final norm."""

    def drop(here: Here, num_visual: int) -> Left:
        keys = here.decoder.heads(here.entering, here.layer - 1, here.rope)[1]
        normed = here.decoder.rms_norm(here.x, here.decoder.weights["norm.scale"])
        prompt = here.place(here.prompt - 1) + 1
        return unlike_pivots(keys, normed, here.is_visual, prompt, kept(num_visual))

    return drop
