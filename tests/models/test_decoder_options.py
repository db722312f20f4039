"""What some decoders have and others have not, against PyTorch, under plans and token pruning.

Norms of q and k, heads whose width is not D, interleaved mRoPE, and deepstack features after the first layers.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.drops import DART, PyramidDrop, SparseVLM
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan
from rlens_jax.pruning import VTW, FastV, Folder
from tests.models.test_pruned import (
    KEY,
    NEW_TOKENS,
    PLAN,
    REDUCTION,
    bare,
    batch_of,
    run,
    run_greedy,
    settings_for,
    torch_inputs,
    torch_of,
)
from tests.numerics import assert_close, error
from tests.ops.test_token_pruning import merged_slowly
from tests.sequences import run_length, unpack
from tests.torch_decoder import TorchDecoder
from tests.toy_decoder import TOY, random_decoder

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONFIG = replace(
    TOY, num_layers=4, head_dim=12, rope_sections=(3, 2, 1), rope_interleaved=True, qkv_bias=False, qk_norm=True, deepstack=3
)
"""72 numbers in the query heads, width 24."""
MASKS = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 6), run_length(7)]
ANSWERS = [2, 3, 1]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, 0.3)


@pytest.fixture(scope="module")
def reference(decoder) -> TorchDecoder:
    return torch_of(decoder, CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Rotary positions that differ by axis."""
    rng = np.random.default_rng(2)
    made = []
    for mask, answer in zip(MASKS, ANSWERS, strict=True):
        ids = rng.integers(0, CONFIG.vocabulary, len(mask)).astype(np.int32)
        rope = np.cumsum(rng.integers(0, 2, (len(CONFIG.rope_sections), len(mask))), axis=1).astype(np.int32)
        made.append(Prompt(ids, mask, rope, int(rope.max()) + 1, answer))
    return made


@pytest.fixture(scope="module")
def vectors() -> list[np.ndarray]:
    """Embedding and features of each token; those of text must not be used."""
    rng = np.random.default_rng(3)
    return [rng.standard_normal((len(mask), CONFIG.visual_width)).astype(np.float32) for mask in MASKS]


def theirs(reference: TorchDecoder, prompt: Prompt, row: np.ndarray) -> tuple[tuple, torch.Tensor]:
    """The inputs and the features of a sample."""
    features = torch.from_numpy(row[: len(prompt.is_visual), CONFIG.width :]).unflatten(1, (CONFIG.deepstack, CONFIG.width))
    return torch_inputs(reference, prompt, row[:, : CONFIG.width]), features


CASES = [
    (Plan(), None),
    (PLAN, None),
    (PLAN, FastV(1, 0.6)),
    (Plan(), FastV(2, 0.5)),
    (Plan(), VTW(2)),
    (Plan(), PyramidDrop()),
    (PLAN, SparseVLM((20, 10, 6), version="1.5")),
    (Plan(), SparseVLM(keep=(0.7, 0.3), layers=(1, 3))),
    (Plan(), DART(keep=0.4, layer=1)),
]


@pytest.mark.parametrize(("plan", "pruning"), CASES, ids=lambda value: "none" if value is None else value.label())
def test_logits_are_those_of_pytorch(decoder, reference, prompts, vectors, plan, pruning):
    batch, visual = batch_of(prompts, vectors)
    logits, layout, scored = run(*nnx.split(decoder), visual, batch, plan, pruning)
    assert scored.all()
    for prompt, row, ours in zip(prompts, vectors, unpack(logits, layout), strict=True):
        last = len(prompt.token_ids) - 1 - prompt.answer_length
        inputs, features = theirs(reference, prompt, row)
        expected = reference(*inputs, last, settings_for(plan, pruning), features)
        assert expected.gap > 1e-4
        assert_close(ours, expected.logits, 1e-4)
        without = reference(*inputs, last, settings_for(plan, pruning))
        if prompt.num_visual and without.positions == expected.positions:
            assert error(expected.logits, without.logits) > 1e-2


def test_merged_tokens_take_the_mean_of_their_features_along(decoder, reference, prompts, vectors):
    batch, visual = batch_of(prompts, vectors)
    logits, layout, _ = run(*nnx.split(decoder), visual, batch, PLAN, Folder(0.6))
    for prompt, row, ours in zip(prompts, vectors, unpack(logits, layout), strict=True):
        (x, is_visual, rope), features = theirs(reference, prompt, row)
        merged, kept = merged_slowly(row, prompt.is_visual, "0.6", CONFIG.width)
        left = [t for t in range(len(x)) if not prompt.is_visual[t] or t in kept]
        x[kept] = torch.from_numpy(merged[:, : CONFIG.width])
        features[kept] = torch.from_numpy(merged[:, CONFIG.width :]).unflatten(1, (CONFIG.deepstack, CONFIG.width))
        expected = reference(x[left], is_visual[left], rope[left], 0, settings_for(PLAN, None), features[left])
        assert_close(ours, expected.logits, 1e-4)


def test_greedy_tokens_with_normed_keys_and_without_features_are_those_of_pytorch(decoder, reference, prompts, vectors):
    prompts = bare(prompts)
    batch, visual = batch_of(prompts, vectors)
    tokens, _ = run_greedy(*nnx.split(decoder), visual, batch, PLAN, None)
    for prompt, row, ours in zip(prompts, vectors, tokens, strict=True):
        (x, is_visual, rope), features = theirs(reference, prompt, row)
        expected = reference.greedy(x, is_visual, rope, prompt.next_rope, NEW_TOKENS, settings_for(PLAN, None), features)
        assert ours.tolist() == [expected]


@partial(jax.jit, static_argnames=("graph", "chunk"))
def run_chunked(graph, state, visual, batch, chunk):
    decoder = nnx.merge(graph, state)
    context = decoder.context(
        batch.layout, jnp.asarray(batch.rope_positions), KEY, chunk=chunk, features=decoder.features(visual)
    )
    x, _ = decoder.prefill(decoder.embed(batch.text_ids, visual), context, PLAN, REDUCTION)
    return decoder.logits(x)


def test_a_prefill_in_chunks_has_the_features(decoder, prompts, vectors):
    batch, visual = batch_of(prompts, vectors)
    logits, layout, _ = run(*nnx.split(decoder), visual, batch, PLAN, None)
    for ours, whole in zip(
        unpack(run_chunked(*nnx.split(decoder), visual, batch, 8), layout), unpack(logits, layout), strict=True
    ):
        assert_close(ours, whole, 1e-5)


def test_features_that_are_missing_or_not_wanted_are_an_error(decoder, prompts, vectors):
    batch, visual = batch_of(prompts, vectors)
    with pytest.raises(ValueError, match="deepstack = 3, but features are missing"):
        decoder.context(batch.layout, batch.rope_positions, KEY)
    plain = random_decoder(replace(CONFIG, deepstack=0), 0.3)
    with pytest.raises(ValueError, match="deepstack = 0, but features are given"):
        plain.context(batch.layout, batch.rope_positions, KEY, features=decoder.features(visual))
