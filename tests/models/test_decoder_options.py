"""What some decoders have and others have not, against PyTorch: norms of q and k, heads whose width is not D."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from rlens_jax.models.decoder import Decoder
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan
from tests.models.test_pruned import NEW_TOKENS, PLAN, bare, batch_of, run, run_greedy, settings_for, torch_inputs
from tests.numerics import assert_close
from tests.sequences import run_length, unpack
from tests.torch_decoder import TorchDecoder
from tests.toy_decoder import TOY, random_decoder

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONFIG = replace(TOY, num_layers=4, head_dim=6, rope_sections=(2, 1), qkv_bias=False, qk_norm=True)
"""36 numbers in the query heads, width 24."""
MASKS = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 6), run_length(7)]
ANSWERS = [2, 3, 1]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, 0.3)


@pytest.fixture(scope="module")
def reference(decoder) -> TorchDecoder:
    weights = {
        ".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(decoder))
    }
    return TorchDecoder(weights, CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(2)
    made = []
    for mask, answer in zip(MASKS, ANSWERS, strict=True):
        ids = rng.integers(0, CONFIG.vocabulary, len(mask)).astype(np.int32)
        rope = np.cumsum(rng.integers(0, 2, (len(CONFIG.rope_sections), len(mask))), axis=1).astype(np.int32)
        made.append(Prompt(ids, mask, rope, int(rope.max()) + 1, answer))
    return made


@pytest.fixture(scope="module")
def vectors() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((len(mask), CONFIG.width)).astype(np.float32) for mask in MASKS]


def logits_of(decoder, prompts, vectors, plan):
    batch, visual = batch_of(prompts, vectors)
    logits, layout, scored = run(*nnx.split(decoder), visual, batch, plan, None)
    assert scored.all()
    return unpack(logits, layout)


@pytest.mark.parametrize("plan", [Plan(), PLAN], ids=Plan.label)
def test_logits_are_those_of_pytorch(decoder, reference, prompts, vectors, plan):
    for prompt, row, ours in zip(prompts, vectors, logits_of(decoder, prompts, vectors, plan), strict=True):
        expected = reference(*torch_inputs(reference, prompt, row), 0, settings_for(plan, None))
        assert expected.logits.std() > 1
        assert_close(ours, expected.logits, 1e-4)


def test_cached_keys_are_normed(decoder, reference, prompts, vectors):
    prompts = bare(prompts)
    batch, visual = batch_of(prompts, vectors)
    tokens, _ = run_greedy(*nnx.split(decoder), visual, batch, PLAN, None)
    for prompt, row, ours in zip(prompts, vectors, tokens, strict=True):
        x, is_visual, rope = torch_inputs(reference, prompt, row)
        assert ours.tolist() == [reference.greedy(x, is_visual, rope, prompt.next_rope, NEW_TOKENS, settings_for(PLAN, None))]
