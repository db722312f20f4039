"""The cost of a prefill: multiply-adds of the decoder layers, dense and reduced.

Counts follow the convention of the field, so that they compare with published ones. In dense attention every pair of tokens
counts (no causal halving). Norms, rotary embedding, softmax, embeddings and vision tower are not counted. Time is not considered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rlens_jax.drops import DART, PyramidDrop, SparseVLM, num_recycled
from rlens_jax.kept_tokens import CDPruner, DivPrune, FasterVLM, Pooling, TowerSelection, VisionZip
from rlens_jax.plans import FULL, SKIP, Level, Plan, Reduction, value_of
from rlens_jax.pruning import FastV, Folder, Pruning, decoder_stages


@dataclass(frozen=True)
class LayerSizes:
    """Widths of a decoder layer: D, N * H of all query heads, K * H of all kv heads, and F."""

    width: int
    query_width: int
    kv_width: int
    ffn_width: int


@dataclass(frozen=True)
class TowerAttention:
    """The attention in a vision tower by which tokens may be chosen, as far as its cost depends on it."""

    width: int
    head_dim: int
    class_token: bool
    """Whether it is that of a class token; otherwise what patches receive from all."""
    patches: int
    """Patches of a visual token."""
    view: int | None
    """Patches of a view, which attend to each other; None if those of an image do."""

    def cost(self, num_visual: int) -> int:
        """Multiply-adds of the marks of a sample with so many visual tokens: queries, keys and their products."""
        patches = num_visual * self.patches
        reached = patches if self.view is None else min(patches, self.view)
        queries = patches if not self.class_token else -(-patches // reached) if reached else 0
        return (queries + patches) * self.width**2 + queries * reached * self.width


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder's layers: L, D, N, K, H and F, and whether the projections to q, k and v have a bias."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    qkv_bias: bool
    qk_norm: bool = field(default=False, kw_only=True)
    """Whether each head of q and k goes through an RMSNorm over H (Qwen3)."""

    @property
    def position_axes(self) -> int:
        """Number of a token's rotary positions, as far as it is known: 1 where only sizes are."""
        return 1

    @property
    def layer_sizes(self) -> LayerSizes:
        """The widths that determine a layer's cost."""
        return LayerSizes(self.width, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.ffn_width)


_QWEN2_7B = DecoderSizes(28, 3584, 28, 4, 128, 18944, qkv_bias=True)
_VICUNA_7B = DecoderSizes(32, 4096, 32, 32, 128, 11008, qkv_bias=False)
_QWEN3_8B = DecoderSizes(36, 4096, 32, 8, 128, 12288, qkv_bias=False, qk_norm=True)
_QWEN3_4B = DecoderSizes(36, 2560, 32, 8, 128, 9728, qkv_bias=False, qk_norm=True)
PUBLISHED_DECODERS: Mapping[str, DecoderSizes] = {
    "internvl2-8b": DecoderSizes(32, 4096, 32, 8, 128, 14336, qkv_bias=False),
    "qwen2-vl-7b": _QWEN2_7B,
    "minicpm-v-2.6": _QWEN2_7B,
    "llava-onevision-7b": _QWEN2_7B,
    "qwen2-vl-2b": DecoderSizes(28, 1536, 12, 2, 128, 8960, qkv_bias=True),
    "llava-onevision-0.5b": DecoderSizes(24, 896, 14, 2, 64, 4864, qkv_bias=True),
    "qwen2.5-vl-7b": _QWEN2_7B,
    "qwen2.5-vl-3b": DecoderSizes(36, 2048, 16, 2, 128, 11008, qkv_bias=True),
    "llava-1.5-7b": _VICUNA_7B,
    "llava-1.5-13b": DecoderSizes(40, 5120, 40, 40, 128, 13824, qkv_bias=False),
    "llava-next-vicuna-7b": _VICUNA_7B,
    "llava-next-mistral-7b": DecoderSizes(32, 4096, 32, 8, 128, 14336, qkv_bias=False),
    "qwen3-vl-8b": _QWEN3_8B,
    "qwen3-vl-4b": _QWEN3_4B,
    "internvl3.5-8b": _QWEN3_8B,
    "internvl3.5-4b": _QWEN3_4B,
    "internvl3.5-1b": DecoderSizes(28, 1024, 16, 8, 128, 3072, qkv_bias=False, qk_norm=True),
}
"""The paper's models, and others of the supported families."""


def layer_cost(
    sizes: LayerSizes, num_text: int, num_visual: int, reduction: Reduction, *, attention: Level, ffn: Level, with_probes: bool
) -> int:
    """Multiply-adds of one layer in the prefill of one sample, an exact integer; `attention` and `ffn` are its levels.

    The range is counted in visual tokens, so with `window="position"` and text between images the result is an upper bound.
    `with_probes` includes the gate and up projections of the probes, which the field usually omits.
    """
    num_tokens = num_text + num_visual
    reach, fraction = value_of("attention", attention, reduction), value_of("ffn", ffn, reduction)
    queries = num_text if reach == SKIP else num_tokens
    projections = 2 * sizes.width * (num_tokens * sizes.kv_width + queries * sizes.query_width)
    pairs = num_tokens * queries
    if not isinstance(reach, str):
        pairs -= num_visual * (num_visual - min(num_visual, int(reach)))
    units, probes = sizes.ffn_width if fraction == FULL else 0, 0
    if not isinstance(fraction, str):
        units = replace(reduction, active_fraction=fraction).kept_units(sizes.ffn_width)
        probes = reduction.probe_count(num_visual) if with_probes else 0
    products = 3 * (sizes.ffn_width * num_text + units * num_visual) + 2 * sizes.ffn_width * probes
    return projections + 2 * pairs * sizes.query_width + sizes.width * products


def branch_cost(sizes: LayerSizes, trunk: int, branch: int) -> int:
    """Multiply-adds of one layer for the `branch` text tokens of a prompt that shares its first `trunk` tokens with others.

    The shared tokens cost `layer_cost`, once. The branch attends to them and to itself. No plan reduces it.
    """
    projections = branch * 2 * sizes.width * (sizes.query_width + sizes.kv_width)
    return projections + 2 * branch * (trunk + branch) * sizes.query_width + 3 * sizes.width * sizes.ffn_width * branch


def visual_in_layer(pruning: Pruning | None, num_visual: int, num_layers: int) -> list[int]:
    """Visual tokens in each layer, from `num_visual` before pruning. UserError if the pruned layer does not exist."""
    if pruning is None:
        return [num_visual] * num_layers
    pruning.validate(num_layers)
    counts = [num_visual] * num_layers
    for stage in pruning.stages(num_layers):
        counts[stage.layer :] = [stage.kept(num_visual)] * (num_layers - stage.layer)
    return counts


def mean_visual(visual_in_layer: Sequence[int]) -> float:
    """Visual tokens that enter a layer, mean over the layers; published budgets often count those kept instead."""
    return sum(visual_in_layer) / len(visual_in_layer)


def selection_cost(
    sizes: LayerSizes,
    num_layers: int,
    num_text: int,
    num_visual: int,
    pruning: Pruning | None,
    tower: TowerAttention | None = None,
) -> int:
    """Multiply-adds of choosing or merging the visual tokens of one sample, which no other cost contains.

    Counted is what is computed: products of tokens with each other, rows of attention with their queries, PyramidDrop's keys, and
    attention of the tower that is computed once more (without `tower`: not counted). Sorting and norms are not counted, as in
    layers.
    """
    if num_visual == 0:
        return 0
    match pruning:
        case Folder():
            return _merging_rounds(num_visual, pruning.kept(num_visual)) * num_visual**2 * sizes.width
        case Pooling():
            return pruning.kept(num_visual) * num_visual * sizes.width
        case DivPrune():
            return (num_visual + pruning.kept(num_visual)) * num_visual * sizes.width
        case CDPruner():
            # The relevance, the rows of the kernel, and the rows of its Cholesky factor.
            kept = pruning.kept(num_visual)
            return (1 + kept) * num_visual * sizes.width + kept * (kept - 1) // 2 * num_visual
        case VisionZip() if tower is not None:
            merging = pruning.contextual(num_visual) * num_visual * (tower.head_dim + sizes.width)
            return tower.cost(num_visual) + merging
        case FasterVLM() if tower is not None:
            return tower.cost(num_visual)
    visual = visual_in_layer(pruning, num_visual, num_layers)
    entering = [visual[stage.layer - 1] for stage in decoder_stages(pruning, num_layers)]
    return sum(_drop_cost(sizes, num_text, num_visual, pruning, step, count) for step, count in enumerate(entering))


def _drop_cost(sizes: LayerSizes, num_text: int, num_visual: int, pruning: Pruning | None, step: int, entering: int) -> int:
    """As `selection_cost`, of one step of a method that drops tokens between layers, with `entering` visual tokens before it."""
    num_tokens = num_text + entering

    def rows(queries: int) -> int:
        return queries * sizes.query_width * (sizes.width + num_tokens)

    match pruning:
        case FastV():
            return rows(1 if pruning.attention == "last_token" else num_tokens)
        case PyramidDrop():
            return rows(1) + num_tokens * sizes.width * sizes.kv_width
        case SparseVLM():
            matching = num_text * num_visual * sizes.width if step == 0 else 0
            merged = num_recycled(entering - pruning.chosen(step, num_visual)) if pruning.merges else 0
            return rows(num_text) + matching + merged**2 * sizes.width
        case DART():
            return (pruning.pivots_visual + pruning.pivots_text) * entering * sizes.width
    return 0


def _merging_rounds(count: int, kept: int) -> int:
    """Rounds of FOLDER's merging for one image: each merges at most half of the tokens."""
    rounds = 0
    while count > kept:
        count -= min(count - kept, count // 2)
        rounds += 1
    return rounds


def prefill_cost(
    sizes: LayerSizes, num_text: int, visual_in_layer: Sequence[int], plan: Plan, reduction: Reduction, *, with_probes: bool
) -> int:
    """Multiply-adds of all decoder layers in the prefill of one sample.

    `visual_in_layer` holds the number of visual tokens in each of the L layers; they differ only after pruning (function
    `visual_in_layer`). Other arguments as in `layer_cost`.
    """
    cost = partial(layer_cost, sizes, num_text, reduction=reduction, with_probes=with_probes)
    settings = plan.settings(len(visual_in_layer))
    return sum(
        cost(num_visual, attention=attention, ffn=ffn)
        for num_visual, (attention, ffn) in zip(visual_in_layer, settings, strict=True)
    )


def shared_prefill_cost(
    sizes: LayerSizes,
    num_text: int,
    visual_in_layer: Sequence[int],
    plan: Plan,
    reduction: Reduction,
    *,
    trunk_text: int,
    sharers: int,
    with_probes: bool,
) -> float:
    """As `prefill_cost`, for one of several prompts that share a row: its part of the trunk's cost, and that of its branch.

    Args:
        trunk_text: text tokens of the trunk, which holds all visual tokens.
        sharers: prompts in the row.
    """
    trunk = prefill_cost(sizes, trunk_text, visual_in_layer, plan, reduction, with_probes=with_probes)
    branch = sum(branch_cost(sizes, trunk_text + visual, num_text - trunk_text) for visual in visual_in_layer)
    return trunk / sharers + branch


def saving(
    sizes: LayerSizes,
    num_text: int,
    visual_in_layer: Sequence[int],
    plan: Plan,
    reduction: Reduction,
    *,
    with_probes: bool,
    num_visual: int | None = None,
) -> float:
    """The share of the dense prefill's multiply-adds that plan and pruning save.

    The dense model has `num_visual` visual tokens in all layers; None is the number in the first layer, which is correct
    unless tokens are merged before it. Other arguments as in `prefill_cost`.
    """
    unpruned = [visual_in_layer[0] if num_visual is None else num_visual] * len(visual_in_layer)
    dense = prefill_cost(sizes, num_text, unpruned, Plan(), reduction, with_probes=with_probes)
    reduced = prefill_cost(sizes, num_text, visual_in_layer, plan, reduction, with_probes=with_probes)
    return (dense - reduced) / dense


def prefill_summary(
    sizes: LayerSizes, num_layers: int, num_text: int, num_visual: int, plan: Plan, reduction: Reduction, pruning: Pruning | None
) -> dict[str, Any]:
    """Multiply-adds of the dense prefill, of the reduced one, and of pruning, as `rlens_jax.cost` writes them.

    That of pruning is null if the vision tower has a part in it, of which only the whole model knows.
    """
    of = sizes, num_layers, num_text, num_visual
    visual = visual_in_layer(pruning, num_visual, num_layers)
    dense = prefill_cost(sizes, num_text, [num_visual] * num_layers, Plan(), reduction, with_probes=False)
    summary: dict[str, Any] = {
        "schema": "rlens-cost/1",
        "num_layers": num_layers,
        "text_tokens": num_text,
        "visual_tokens_in_layer": visual,
        "mean_visual_tokens": mean_visual(visual),
        "dense": dense,
        "selection": None if isinstance(pruning, TowerSelection) else selection_cost(*of, pruning),
    }
    for name, with_probes in (("without_probes", False), ("with_probes", True)):
        reduced = prefill_cost(sizes, num_text, visual, plan, reduction, with_probes=with_probes)
        summary[name] = {"reduced": reduced, "share_of_dense": reduced / dense}
    return summary


def mean_saving(
    sizes: LayerSizes, samples: Sequence[tuple[int, int]], num_layers: int, reduction: Reduction, plan: Plan, with_probes: bool
) -> float:
    """`saving`, mean over `samples`, each with its numbers of text and visual tokens; padding does not count."""
    shares = [saving(sizes, text, [visual] * num_layers, plan, reduction, with_probes=with_probes) for text, visual in samples]
    return sum(shares) / len(shares)
