"""Baselines that choose visual tokens before the decoder, against PyTorch: Hugging Face's models on tokens chosen by loops."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.drops import Positions
from rlens_jax.kept_tokens import CDPruner, DivPrune, FasterVLM, Pooling, RandomTokens, Selection, StridedTokens, VisionZip
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.pruned import run_prompt
from rlens_jax.ops.token_pruning import num_survivors
from rlens_jax.ops.token_selection import Budget, drawn_tokens
from rlens_jax.plans import Plan, Reduction
from tests import torch_selection
from tests.families import llava, qwen2_vl, tower_attention
from tests.families.contract import BOTH, DENSE, WHOLE
from tests.families.pair import Pair, make_pair
from tests.families.prefill import SPARE, plain_batch
from tests.numerics import assert_close
from tests.sequences import unpack
from tests.torch_reductions import reduced
from tests.torch_support import tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = Reduction(attention_range=5, active_fraction=0.3)
KEY = jax.random.key(3)
NEW_TOKENS = 4
RAGGED = {
    "llava": [[3, (20, 33), 5], [2, (11, 14), 1, (30, 9), 3, (13, 13), 11], [13], [1, (61, 47), 6]],
    "qwen2_vl": [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13], [1, (12, 18), 6]],
}
"""Numbers of text tokens, and images: heights and widths in pixels, or grids of patches."""


@dataclass(frozen=True)
class Case:
    """A batch of a family, on both sides."""

    pair: Pair
    examples: list[Any]
    batch: Any
    visual: Any
    """[B, P, visual_width and marks]."""
    inputs: Callable[[Any], dict[str, torch.Tensor]]
    marks: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def make_llava(folder: Any) -> Case:
    pair = make_pair(folder, llava.tiny_llava(0))
    examples = [llava.make_example(pair.config, seed, parts) for seed, parts in enumerate(RAGGED["llava"], 1)]
    arrays, source = llava.our_images(pair.config, examples)
    tokens = jax.jit(pair.ours.vision.marked)(*arrays)
    return Case(
        pair,
        examples,
        plain_batch(examples),
        tokens.reshape(-1, tokens.shape[-1])[source],
        llava.hf_inputs,
        tower_attention.llava,
    )


def make_qwen(folder: Any) -> Case:
    pair = make_pair(folder, tiny_qwen2_vl(0))
    examples = [qwen2_vl.make_example(seed, parts, pair.config) for seed, parts in enumerate(RAGGED["qwen2_vl"], 1)]
    images, batch = qwen2_vl.our_images(examples, pair.config, SPARE[1]), qwen2_vl.our_batch(examples, pair.config, SPARE)
    tokens = jax.jit(pair.ours.vision.marked)(*images.tower_inputs)
    return Case(
        pair, examples, batch, tokens.reshape(-1, tokens.shape[-1])[images.source], qwen2_vl.hf_inputs, tower_attention.qwen
    )


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return {"llava": make_llava, "qwen2_vl": make_qwen}[request.param](tmp_path_factory.mktemp(request.param))


@partial(jax.jit, static_argnames=("graph", "plan", "pruning"))
def run(graph, state, visual, batch, plan: Plan, pruning: Selection):
    """Logits of all slots, the layout of what is left, and were all scores numbers."""
    decoder = nnx.merge(graph, state)
    states = run_prompt(decoder, visual, batch, plan, SMALL, KEY, pruning=pruning)
    return decoder.logits(states.x), states.parts[-1].layout, states.scored.all()


@torch.no_grad()
def decoder_inputs(case: Case, example: Any) -> dict[str, torch.Tensor]:
    """Embeddings and rotary positions of all tokens, as Hugging Face's model hands them to its decoder."""
    seen: dict[str, Any] = {}
    language_model = case.pair.text_model
    hook = language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    case.pair.theirs(**case.inputs([example]))
    hook.remove()
    position = seen["position_ids"]
    return {"x": seen["inputs_embeds"][0], "position": torch.arange(len(example.token_ids)) if position is None else position}


def question(case: Case, example: Any) -> torch.Tensor:
    """Embeddings of the text behind the last image."""
    last = int(np.flatnonzero(example.is_visual)[-1])
    return case.pair.theirs.get_input_embeddings()(torch.tensor(example.token_ids[last + 1 :]).long()).detach()


def chosen(
    case: Case, example: Any, visual: torch.Tensor, pruning: Selection, drawn: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """What stays of the visual tokens [P, D], and its ordinals; random ones are `drawn`."""
    count = pruning.kept(len(visual))
    if isinstance(pruning, Pooling):
        return torch_selection.pooled(visual, pruning.side, pruning.cells(len(visual)))
    if isinstance(pruning, FasterVLM | VisionZip):
        marks = case.marks(case.pair.theirs, case.inputs([example]))
        score, key = marks[:, 0], marks[:, 1:]
        if isinstance(pruning, VisionZip):
            return torch_selection.visionzip(visual, score, key, count, halved=pruning.merge == "mean")
        kept = sorted(torch.argsort(score, descending=True)[:count].tolist())
        return visual[kept], kept
    kept = {
        RandomTokens: lambda: drawn,
        StridedTokens: lambda: torch_selection.strided(visual, count),
        DivPrune: lambda: torch_selection.divprune(visual, count),
        CDPruner: lambda: torch_selection.cdpruner(visual, question(case, example), count),
    }[type(pruning)]()
    return visual[kept], kept


@dataclass(frozen=True)
class Left:
    """What is left of one sample: embeddings [T, D], rotary positions [..., T], and which tokens are visual."""

    x: torch.Tensor
    position: torch.Tensor
    is_visual: torch.Tensor

    def followed_by(self, x: torch.Tensor, position: int) -> "Left":
        """With another text token."""
        further = torch.full_like(self.position[..., :1], position)
        mask = torch.cat([self.is_visual, torch.tensor([False])])
        return Left(torch.cat([self.x, x[None]]), torch.cat([self.position, further], dim=-1), mask)


@torch.no_grad()
def left_of(case: Case, example: Any, pruning: Selection, drawn: list[int]) -> Left:
    """A sample with fewer visual tokens."""
    given = decoder_inputs(case, example)
    x, position, left = given["x"], given["position"], torch.arange(len(example.token_ids))
    if example.is_visual.any():
        places = torch.tensor(np.flatnonzero(example.is_visual))
        tokens, ordinals = chosen(case, example, x[places], pruning, drawn)
        x[places[ordinals]] = tokens
        left = torch.tensor(sorted(np.flatnonzero(~example.is_visual).tolist() + places[ordinals].tolist()))
    position = torch.arange(len(left)) if pruning.positions == "renumbered" else position[..., left]
    return Left(x[left], position[None] if position.ndim == 1 else position, torch.tensor(example.is_visual)[left])


@torch.no_grad()
def theirs(case: Case, left: Left, plan: Plan) -> np.ndarray:
    """Logits of what is left of one sample."""
    inputs = {"inputs_embeds": left.x[None], "attention_mask": torch.ones(1, len(left.x), dtype=torch.long)}
    reach = SMALL.attention_range
    with reduced(case.pair.theirs, [left.is_visual], plan.attention, plan.ffn, reach, "0.3", "0.1") as record:
        states = case.pair.text_model(**inputs, position_ids=left.position, use_cache=False).last_hidden_state
    assert record.smallest_gap() > 1e-4
    return case.pair.theirs.lm_head(states)[0].numpy()


METHODS = [
    (BOTH, RandomTokens(5)),
    (DENSE, StridedTokens(4)),
    (BOTH, DivPrune(0.5)),
    (DENSE, CDPruner(6)),
    (BOTH, Pooling(5, side=llava.SIDE)),
    (BOTH, FasterVLM(0.4)),
    (DENSE, VisionZip(14)),
    (BOTH, VisionZip(14, "mean")),
    (BOTH, DivPrune(0.5, positions="renumbered")),
]


@pytest.mark.parametrize(("plan", "pruning"), METHODS, ids=lambda value: value.label())
def test_logits(case: Case, plan: Plan, pruning: Selection) -> None:
    """Ragged samples together, alone and on top of a plan; the token counts are those of the budget."""
    if case.inputs is qwen2_vl.hf_inputs and (isinstance(pruning, Pooling) or pruning.positions == "renumbered"):
        pytest.skip("refused: its images are no grids of one size, and its positions have three parts")
    logits, layout, scored = run(*nnx.split(case.pair.ours.decoder), case.visual, case.batch, plan, pruning)
    assert scored
    draws = drawn_tokens(
        case.batch.layout,
        Budget(num_survivors(case.batch.layout, pruning), pruning.capacity(case.batch.layout.bucket.visual)),
        jax.random.fold_in(KEY, case.pair.config.decoder.num_layers),
    )
    for row, (example, ours) in enumerate(zip(case.examples, unpack(logits, layout), strict=True)):
        kept = pruning.kept(int(example.is_visual.sum()))
        assert len(ours) == (~example.is_visual).sum() + kept
        assert_close(ours, theirs(case, left_of(case, example, pruning, draws[row, :kept].tolist()), plan), WHOLE)
    most = max(int(example.is_visual.sum()) for example in case.examples)
    assert 0 < pruning.kept(most) < most


@partial(jax.jit, static_argnames=("graph", "pruning"))
def run_greedy(graph, state, visual, batch, pruning: Selection):
    """New tokens of each sample, and the cache."""
    decoder = nnx.merge(graph, state)
    first, cache, _ = prefill(decoder, visual, batch, BOTH, SMALL, NEW_TOKENS, KEY, pruning=pruning)
    return decode(decoder, first, cache, batch, NEW_TOKENS, ())[0], cache


@pytest.mark.parametrize("positions", get_args(Positions))
def test_greedy_tokens_with_a_cache_of_the_survivors(case: Case, positions: Positions) -> None:
    """Merged tokens on top of a plan, in a batch, against whole passes of PyTorch; each layer holds the survivors."""
    if case.inputs is qwen2_vl.hf_inputs and positions == "renumbered":
        pytest.skip("refused: its positions have three parts")
    pruning, bucket = VisionZip(14, positions=positions), case.batch.layout.bucket
    tokens, cache = run_greedy(*nnx.split(case.pair.ours.decoder), case.visual, case.batch, pruning)
    assert set(np.asarray(cache.stop - cache.start - NEW_TOKENS).tolist()) == {bucket.text + 14}
    embedding = case.pair.theirs.get_input_embeddings().weight.detach()
    for row in (0, 1):
        left, expected = left_of(case, case.examples[row], pruning, []), []
        for step in range(NEW_TOKENS):
            expected.append(int(theirs(case, left, BOTH)[-1].argmax()))
            position = int(case.batch.next_rope[row, 0]) + step if positions == "kept" else len(left.x)
            left = left.followed_by(embedding[expected[-1]], position)
        assert tokens[row].tolist() == [expected]
    assert len(set(np.asarray(tokens).ravel().tolist())) > 3
