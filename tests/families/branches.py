"""The contract of branches: a prompt that shares a row with others has the logits and the greedy tokens that it has alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.models.decoder import TracedPlan, as_data
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Penalty, decode, prefill
from rlens_jax.models.prompt import FILLER, Branches, Places, Prompt, PromptBatch, collate
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plans import Plan, Reduction
from tests.numerics import assert_close, error
from tests.sequences import branch_tokens, bucket_for, pack, unpack

BRANCHES = ((5, 12), (3, 9, 0, 17, 6), (8,))
"""Text tokens of the branches of each row; the trunks hold one image, several images with text between, and none."""
NEW_TOKENS = 16
PENALTY = Penalty(1.2, True, (4,))
"""It counts the tokens of a branch, not those of the others in its row."""
KEY = jax.random.key(0)
Outputs = tuple[list[np.ndarray], list[list[int]]]
"""Logits of all tokens of each prompt, and the greedy tokens after it."""


@dataclass(frozen=True)
class Rows:
    """Rows of branches as a batch."""

    rows: Sequence[Branches]
    batch: PromptBatch
    visual: np.ndarray


@dataclass(frozen=True)
class Sharing:
    """The same prompts with and without sharing, as batches of equal shapes, so that one program serves both."""

    examples: Sequence[Any]
    """One per prompt, as the family's."""
    together: Rows
    alone: Rows


def make_rows(rows: Sequence[Branches], visual: Sequence[np.ndarray], like: Sequence[Branches], total: int) -> Rows:
    """A batch in a bucket that holds the rows `like`, with filler up to `total` rows and nonsense in empty places."""
    filler = [Branches.alone(Prompt.plain(np.zeros(1), np.zeros(1, bool)))] * (total - len(rows))
    counts = iter(range(sum(len(row.prompts) for row in rows)))
    samples = [[next(counts) for _ in row.prompts] for row in rows] + [[FILLER]] * len(filler)
    bucket = bucket_for([row.tokens.is_visual for row in like], (2, 3))
    places = Places(max(len(row.prompts) for row in like), 1)
    batch = collate([*rows, *filler], samples, [0] * total, bucket, places)
    batch.text_ids[batch.layout.text_position > 10**6] = 12
    values = [np.zeros((len(row.tokens.is_visual), visual[0].shape[1]), np.float32) for row in (*rows, *filler)]
    for row, tokens, given in zip(rows, values, visual, strict=False):
        tokens[row.tokens.is_visual] = given
    packed = pack(values, batch.layout, lambda shape: np.full(shape, 1e2, np.float32))[:, bucket.text :]
    return Rows(rows, jax.tree.map(jnp.asarray, batch), packed)


@partial(jax.jit, static_argnames=("graph", "reduction"))
def run(graph: Any, state: Any, batch: PromptBatch, visual: Any, plan: TracedPlan, reduction: Reduction) -> Any:
    """Logits of all slots, the greedy tokens of each branch, and were all its numbers finite."""
    decoder = nnx.merge(graph, state)
    logits = decoder.logits(run_prompt(decoder, visual, batch, plan, reduction, KEY).x)
    first, caches, finite = prefill(decoder, visual, batch, plan, reduction, NEW_TOKENS, KEY, penalty=PENALTY)
    return logits, decode(decoder, first, caches, batch, NEW_TOKENS, (), PENALTY)[0], finite


def outputs(model: VisionLanguageModel, given: Rows, plan: Plan, reduction: Reduction) -> Outputs:
    """The results of each prompt of the rows."""
    traced = as_data(plan, model.decoder.config.num_layers)
    logits, tokens, finite = run(*nnx.split(model.decoder), given.batch, given.visual, traced, reduction)
    rows = [
        values[places]
        for row, values in zip(given.rows, unpack(logits, given.batch.layout), strict=False)
        for places in branch_tokens(row.tokens, len(row.prompts))
    ]
    asked = np.asarray(given.batch.samples) != FILLER
    assert np.asarray(finite)[asked].all()
    return rows, np.asarray(tokens)[asked].tolist()


def of_layout(change: Callable[[Any], Mapping[str, Any]]) -> Callable[[PromptBatch], PromptBatch]:
    return lambda batch: replace(batch, layout=replace(batch.layout, **change(batch.layout)))


def counted_on(batch: PromptBatch) -> PromptBatch:
    """Rotary positions of a branch follow those of the branch before."""
    text, end = np.asarray(batch.rope_positions)[:, :, : batch.text_ids.shape[1]], np.asarray(batch.prompt_end)[:, None, :1]
    counted = np.take_along_axis(text, end, axis=2) + np.arange(text.shape[2])[None, None] - end
    behind = np.asarray(batch.layout.text_branch)[:, None] > 1
    return replace(batch, rope_positions=batch.rope_positions.at[:, :, : text.shape[2]].set(np.where(behind, counted, text)))


def next_of_the_first(batch: PromptBatch) -> PromptBatch:
    first = {name: getattr(batch, name)[:, :1] for name in ("next_position", "next_rope")}
    return replace(batch, **{name: jnp.broadcast_to(value, batch.samples.shape) for name, value in first.items()})


WRONG: Mapping[str, Callable[[PromptBatch], PromptBatch]] = {
    "a_branch_sees_another": of_layout(lambda layout: {"text_branch": jnp.minimum(layout.text_branch, 1)}),
    "positions_counted_on_through_the_row": counted_on,
    "new_tokens_follow_the_first_branch": next_of_the_first,
    "probes_from_empty_slots": of_layout(lambda layout: {"num_visual": jnp.full_like(layout.num_visual, layout.bucket.visual)}),
}


class BranchContract(ABC):
    """Branches have the results of their prompts alone, here and in PyTorch, and wrong rows miss them."""

    reduction: ClassVar[Reduction]

    @abstractmethod
    def examples(self, pair: Any, batch: str) -> Sequence[Any]:
        """The examples of a batch; `ragged` has one image, then several, then none."""

    @abstractmethod
    def prompt(self, pair: Any, example: Any) -> Prompt:
        """The prompt of an example."""

    @abstractmethod
    def visual(self, pair: Any, examples: Sequence[Any]) -> list[np.ndarray]:
        """Our visual tokens [P_i, D] of each example."""

    @abstractmethod
    def theirs(self, pair: Any, examples: Sequence[Any]) -> list[np.ndarray]:
        """PyTorch's logits of each example."""

    def asked(self, example: Any, token_ids: np.ndarray) -> Any:
        """The example with more text at its end."""
        is_visual = np.concatenate([example.is_visual, np.zeros(len(token_ids), bool)])
        return replace(example, token_ids=np.concatenate([example.token_ids, token_ids]), is_visual=is_visual)

    @pytest.fixture(scope="class")
    @classmethod
    def sharing(cls, pair: Any) -> Sharing:
        family, rng = cls(), np.random.default_rng(6)
        trunks = family.examples(pair, "ragged")[: len(BRANCHES)]
        visual, examples, together = family.visual(pair, trunks), [], []
        for trunk, lengths in zip(trunks, BRANCHES, strict=True):
            prompts = [family.asked(trunk, rng.integers(3, 150, length).astype(np.int32)) for length in lengths]
            examples += prompts
            made = tuple(family.prompt(pair, prompt) for prompt in prompts)
            together.append(Branches(made, len(family.prompt(pair, trunk).token_ids)))
        alone = [Branches((prompt,), row.trunk) for row in together for prompt in row.prompts]
        repeated = [tokens for tokens, row in zip(visual, together, strict=True) for _ in row.prompts]
        total = len(alone)
        return Sharing(examples, make_rows(together, visual, together, total), make_rows(alone, repeated, together, total))

    def outputs(self, pair: Any, given: Rows, plan: Plan) -> Outputs:
        return outputs(pair.ours, given, plan, replace(self.reduction, probe_fraction=0.4))

    @pytest.mark.parametrize("reduced", [False, True], ids=["dense", "reduced"])
    def test_branches(self, pair: Any, sharing: Sharing, reduced: bool) -> None:
        plan = Plan((0, 2, 3), (1, 2, 4)) if reduced else Plan()
        ours, tokens = self.outputs(pair, sharing.together, plan)
        alone, expected = self.outputs(pair, sharing.alone, plan)
        for shared, single in zip(ours, alone, strict=True):
            assert_close(shared, single, 1e-5)
        assert tokens == expected
        assert len(set(map(tuple, tokens))) > len(BRANCHES)
        if not reduced:
            for shared, theirs in zip(ours, self.theirs(pair, sharing.examples), strict=True):
                assert_close(shared, theirs, 1e-4)

    @pytest.mark.parametrize("wrong", WRONG)
    def test_a_wrong_row_misses(self, pair: Any, sharing: Sharing, wrong: str) -> None:
        plan = Plan((0, 2, 3), (1, 2, 4))
        changed = replace(sharing.together, batch=WRONG[wrong](sharing.together.batch))
        logits, tokens = self.outputs(pair, changed, plan)
        alone, expected = self.outputs(pair, sharing.alone, plan)
        missed = max(error(shared, single) for shared, single in zip(logits, alone, strict=True)) > 1e-3
        assert missed if wrong != "new_tokens_follow_the_first_branch" else tokens != expected
