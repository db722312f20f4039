"""Both reductions, and the choices of token-pruning baselines, in plain PyTorch, written from the methods' descriptions and not
from this package's code.

Everything is in sequence order, one sample at a time, with whole masks and whole hidden layers. The functions
run on raw tensors; `reduced` runs them inside a Hugging Face Qwen2-VL with eager attention, in the layers of a
plan.

Axis letters: T tokens of a sample, N query heads, K kv heads, H head dim, D width, F FFN units, P visual tokens,
M probes, U kept units.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal

import torch
from torch import Tensor


def hollow_mask(is_visual: Tensor, attention_range: int | None, window: str = "ordinal") -> Tensor:
    """bool[T, T]: which keys (columns) a query (row) sees; `attention_range` None is causal attention."""
    length = len(is_visual)
    mask = torch.zeros(length, length, dtype=torch.bool)
    is_visual = is_visual.tolist()
    ordinal = [sum(is_visual[:token]) for token in range(length)]
    for query in range(length):
        mask[query, : query + 1] = True
        if attention_range is None or not is_visual[query]:
            continue
        for key in range(query + 1):
            distance = query - key if window == "position" else ordinal[query] - ordinal[key]
            if is_visual[key] and distance >= attention_range:
                mask[query, key] = False
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of one sample: q [N, T, H], k and v [K, T, H], mask bool[T, T]; returns [N, T, H]."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ v


def floor_product(count: int, fraction: str, plus: str = "0") -> int:
    """floor(count * fraction + plus), in decimals."""
    return int((count * Decimal(fraction) + Decimal(plus)).to_integral_value(ROUND_FLOOR))


def probe_ordinals(num_visual: int, probe_fraction: str) -> list[int]:
    """Ordinals of the strided probes."""
    num_probes = min(num_visual, max(1, floor_product(num_visual, probe_fraction)))
    return [i * num_visual // num_probes for i in range(num_probes)]


@dataclass(frozen=True)
class Selection:
    """Kept units (best first), and how much the last kept one beats the first dropped one, relative to it."""

    units: Tensor
    gap: float


def choose_units(hidden: Tensor, active_fraction: str) -> Selection:
    """The best units by mean |H| over the probes; hidden is [M, F]."""
    scores = hidden.float().abs().mean(dim=0)
    width = len(scores)
    num_units = min(width, max(1, floor_product(width, active_fraction, "0.5")))
    ranked, order = torch.sort(scores, descending=True, stable=True)
    gap = float("inf") if num_units == width else float((ranked[num_units - 1] - ranked[num_units]) / ranked[num_units - 1])
    return Selection(order[:num_units], gap)


def dynamic_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    is_visual: Tensor,
    active_fraction: str,
    probe_fraction: str,
    probes: Sequence[int] | None = None,
) -> tuple[Tensor, Selection | None]:
    """One sample through a Probe-Activated Dynamic FFN; x is [T, D], gate and up are [F, D], down is [D, F].

    `probes` are ordinals, the strided ones when None. Without visual tokens this is the dense FFN.
    """
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    if not is_visual.any():
        return hidden @ down.T, None
    visual = torch.nonzero(is_visual)[:, 0]
    if probes is None:
        probes = probe_ordinals(len(visual), probe_fraction)
    selection = choose_units(hidden[visual[list(probes)]], active_fraction)
    dropped = torch.ones(len(gate), dtype=torch.bool)
    dropped[selection.units] = False
    hidden = torch.where(is_visual[:, None] & dropped[None], torch.zeros(()), hidden)
    return hidden @ down.T, selection


@dataclass
class Record:
    """What a reduced pass chose: `selections[layer][sample]`, None for a sample without visual tokens."""

    selections: dict[int, list[Selection | None]] = field(default_factory=dict)

    def smallest_gap(self) -> float:
        gaps = [s.gap for samples in self.selections.values() for s in samples if s is not None]
        return min(gaps, default=float("inf"))


@contextmanager
def reduced(
    model: torch.nn.Module,
    is_visual: Sequence[Tensor],
    attention_layers: Sequence[int] = (),
    ffn_layers: Sequence[int] = (),
    attention_range: int = 256,
    active_fraction: str = "0.2",
    probe_fraction: str = "0.1",
) -> Iterator[Record]:
    """A Qwen2-VL (eager attention) with both reductions in some layers, for right-padded batches.

    Only a prefill is reduced; passes of a single token, as in generation, go through the plain layers.
    """
    layers, record = model.model.language_model.layers, Record()
    replaced = []

    def patch(module: torch.nn.Module, forward) -> None:
        replaced.append(module)
        module.forward = forward

    def hollow(module: torch.nn.Module):
        plain = module.forward

        def forward(hidden_states, attention_mask=None, **others):
            if hidden_states.shape[1] > 1:
                attention_mask = attention_mask.clone()
                hidden = torch.finfo(attention_mask.dtype).min
                for mask, visual in zip(attention_mask[:, 0], is_visual, strict=True):
                    length = len(visual)
                    own = torch.zeros(length, length).masked_fill(~hollow_mask(visual, attention_range), hidden)
                    mask[:length] = hidden
                    mask[:length, :length] = own
            return plain(hidden_states=hidden_states, attention_mask=attention_mask, **others)

        return forward

    def dynamic(module: torch.nn.Module, layer: int):
        plain = module.forward

        def forward(x):
            y = plain(x)
            if x.shape[1] > 1:
                weights = (module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
                record.selections[layer] = []
                for sample, visual in enumerate(is_visual):
                    row, selection = dynamic_ffn(x[sample, : len(visual)], *weights, visual, active_fraction, probe_fraction)
                    y[sample, : len(visual)] = row
                    record.selections[layer].append(selection)
            return y

        return forward

    for layer in attention_layers:
        patch(layers[layer].self_attn, hollow(layers[layer].self_attn))
    for layer in ffn_layers:
        patch(layers[layer].mlp, dynamic(layers[layer].mlp, layer))
    try:
        yield record
    finally:
        for module in replaced:
            del module.forward


@dataclass(frozen=True)
class Left:
    """What a drop of visual tokens leaves of a sample."""

    tokens: list[int]
    """Text and visual tokens that stay, ascending."""
    gap: float
    """How clear the choice was: the smallest difference between the last chosen and the first refused, relative to the former."""
    states: Tensor | None = None
    """The states of all tokens with merged ones in their places, None if nothing is merged."""


def rating_text(x: Tensor, is_visual: Tensor, prompt: int) -> list[int]:
    """SparseVLM's raters: text behind the last image, in the first `prompt` tokens, that matches it; x [T, D] are embeddings."""
    visual = torch.nonzero(is_visual)[:, 0].tolist()
    text = [token for token in range(prompt) if not is_visual[token] and token > max(visual, default=-1)]
    if not visual:
        return text
    match = (x[visual] @ x[text].T).softmax(dim=1).mean(dim=0)
    return [token for token, value in zip(text, match, strict=True) if value > match.mean()] or text


def best_visual(scores: Tensor, is_visual: Tensor, count: int) -> Left:
    """The `count` visual tokens with the largest scores [T], and all text."""
    text, visual = (torch.nonzero(mask)[:, 0].tolist() for mask in (~is_visual, is_visual))
    ranked = sorted(visual, key=lambda token: -float(scores[token]))
    gap = float("inf")
    if 0 < count < len(ranked):
        gap = float(1 - scores[ranked[count]] / scores[ranked[count - 1]])
    return Left(sorted(text + ranked[:count]), gap)


def recycled(left: Left, scores: Tensor, x: Tensor, is_visual: Tensor, width: int) -> Left:
    """SparseVLM 1.5: what `left` drops is merged in part; x [T, D and more] are the states to merge, compared by D = `width`."""
    dropped = [token for token in torch.nonzero(is_visual)[:, 0].tolist() if token not in left.tokens]
    if not dropped:
        return left
    ranked = sorted(dropped, key=lambda token: -float(scores[token]))
    count = int(Decimal(len(dropped)) * Decimal("0.3")) + 1
    members, clusters = sorted(ranked[:count]), min(count, count // 10 + 1)
    gap = left.gap
    if count < len(ranked):
        gap = min(gap, float(1 - scores[ranked[count]] / scores[ranked[count - 1]]))
    points = x[members]
    distance = torch.linalg.norm((points[:, None] - points[None])[..., :width], dim=-1) / width**0.5
    near = distance.sort(dim=1).values[:, :clusters]
    density = torch.exp(-(near**2).mean(dim=1))
    # Two nearest neighbours of each other are equally dense, and no noise tells them apart: the earlier one counts as denser.
    above = [[j for j in range(count) if (float(density[j]), -j) > (float(density[i]), -i)] for i in range(count)]
    denser = [[float(distance[i, j]) for j in others] for i, others in enumerate(above)]
    peak = torch.tensor([min(distances, default=float(distance.max())) for distances in denser])
    product = density * peak
    order = product.argsort(descending=True, stable=True).tolist()
    if clusters < count and product[order[clusters]] != product[order[clusters - 1]]:  # ties go to the earlier token
        gap = min(gap, float(1 - product[order[clusters]] / product[order[clusters - 1]]))
    centres = order[:clusters]
    states = x.clone()
    nearest = {i: i if i in centres else min(centres, key=lambda c: float(distance[i, c])) for i in range(count)}
    for centre in centres:
        states[members[centre]] = points[[i for i in range(count) if nearest[i] == centre]].mean(dim=0)
    return Left(sorted([*left.tokens, *(members[centre] for centre in centres)]), gap, states)


def unlike_pivots(keys: Tensor, normed: Tensor, is_visual: Tensor, prompt: int, count: int) -> Left:
    """DART's choice of `count` visual tokens; keys [K, T, H], normed [T, D] states behind the final norm."""
    norms = keys.abs().sum(dim=(0, 2))
    visual = torch.nonzero(is_visual)[:, 0].tolist()
    text = [token for token in range(prompt) if not is_visual[token] and token > max(visual, default=-1)]
    pivots, gap = [], float("inf")
    for tokens, most in ((visual, min(4, count)), (text, 4)):
        ranked = sorted(tokens, key=lambda token: -float(norms[token]))
        if most < len(ranked):
            gap = min(gap, float(1 - norms[ranked[most]] / norms[ranked[most - 1]]))
        pivots.append(sorted(ranked[:most]))
    kept, pivots = set(pivots[0]), pivots[0] + pivots[1]
    whole, more = divmod(count - len(kept), max(1, len(pivots)))
    for number, pivot in enumerate(pivots):
        cosine = torch.nn.functional.cosine_similarity(normed, normed[pivot][None], dim=1)
        ranked, share = sorted((t for t in visual if t not in kept), key=lambda t: float(cosine[t])), whole + (number < more)
        if 0 < share < len(ranked):
            gap = min(gap, float(cosine[ranked[share]] - cosine[ranked[share - 1]]))
        kept |= set(ranked[:share])
    return Left(sorted([*torch.nonzero(~is_visual)[:, 0].tolist(), *kept]), gap)
