"""Baselines that choose visual tokens before the decoder, in plain PyTorch, written from the methods' descriptions.

One sample at a time, in float64, with loops and whole matrices. `tokens` [P, D] are outputs of the connector; results are
ordinals, ascending.
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize


def strided(tokens: Tensor, count: int) -> list[int]:
    """Every so-many-th token."""
    return [i * len(tokens) // count for i in range(count)]


def pooled(tokens: Tensor, side: int, cells: int) -> tuple[Tensor, list[int]]:
    """Averages of each grid of side x side tokens, and the token in the middle of each cell."""
    grids = tokens.reshape(-1, side, side, tokens.shape[1]).permute(0, 3, 1, 2)
    means = adaptive_avg_pool2d(grids, cells).permute(0, 2, 3, 1).reshape(-1, tokens.shape[1])
    middle = [(i * side // cells + -(-(i + 1) * side // cells) - 1) // 2 for i in range(cells)]
    return means, [grid * side**2 + row * side + column for grid in range(len(grids)) for row in middle for column in middle]


def divprune(tokens: Tensor, count: int) -> list[int]:
    """The greedy answer to the max-min diversity problem."""
    x = normalize(tokens.double(), dim=1)
    distance = 1 - x @ x.T
    others = [[float(distance[i, j]) for j in range(len(x)) if j != i] for i in range(len(x))]
    chosen = [max(range(len(x)), key=lambda i: min(others[i], default=0.0))]
    while len(chosen) < count:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    return sorted(chosen)


def cdpruner(tokens: Tensor, question: Tensor, count: int) -> list[int]:
    """The greedy maximum of the determinant of relevance and similarity; question [X, D] is embeddings of text."""
    x, text = normalize(tokens.double(), dim=1), normalize(question.double(), dim=1)
    cosine = (x @ text.T).mean(dim=1)
    relevance = torch.exp(0.5 * (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min()))
    kernel = relevance[:, None] * (x @ x.T) * relevance[None]
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(x)) if i not in chosen]
        volumes = [float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1]) for i in rest]
        chosen.append(rest[max(range(len(rest)), key=volumes.__getitem__)])
    return sorted(chosen)


def visionzip(tokens: Tensor, score: Tensor, key: Tensor, count: int, halved: bool = False) -> tuple[Tensor, list[int]]:
    """The tokens that are left, and where they were; `score` [P] is attention, `key` [P, H] what tokens are compared by."""
    contextual = int(count / 6.4)
    ranked = sorted(range(len(tokens)), key=lambda i: -float(score[i]))
    dominant, others = ranked[: count - contextual], sorted(ranked[count - contextual :])
    step = len(others) // contextual if contextual else 0
    targets = [others[i * step] for i in range(contextual)]
    unit, groups = normalize(key.double(), dim=1), {target: [] for target in targets}
    for i in others:
        if targets and i not in targets:
            groups[max(targets, key=lambda target: float(unit[i] @ unit[target]))].append(i)
    result = tokens.clone()
    for target, group in groups.items():
        if group:
            result[target] = (tokens[target] + tokens[group].mean(dim=0)) / (2 if halved else 1)
    left = sorted(dominant + targets)
    return result[left], left
