"""Token pruning in the decoder against an independent PyTorch version, plain and on top of a plan."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from rlens_jax.drops import DART, PyramidDrop, SparseVLM
from rlens_jax.errors import UserError
from rlens_jax.models.decoder import Decoder, DecoderConfig
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import VTW, FastV, Folder, Pruning, decoder_stages
from tests.numerics import assert_close, error
from tests.ops.test_token_pruning import merged_slowly
from tests.sequences import bucket_for, pack, run_length, unpack
from tests.torch_decoder import Settings, TorchDecoder, dart, fastv, pyramid, sparse, withdraw
from tests.toy_decoder import TOY, random_decoder

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CONFIG = replace(TOY, num_layers=4, rope_sections=(1, 1))
REDUCTION = Reduction(attention_range=3, active_fraction=0.3)
MASKS = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 6), run_length(7), run_length(1, 1, 3)]
"""Ragged: long, two images with text between, none, one with a single visual token."""
ANSWERS = [2, 3, 1, 0]
PLAN = Plan(attention=(0, 2, 3), ffn=(1, 3))
"""Reduced layers on both sides of the pruning."""
NEW_TOKENS = 5
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Every parameter drawn at random, so that logits are of order 1 and attention is not flat."""
    return random_decoder(CONFIG, 0.3)


def torch_of(decoder: Decoder, config: DecoderConfig) -> TorchDecoder:
    weights = {
        ".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(decoder))
    }
    return TorchDecoder(weights, config)


@pytest.fixture(scope="module")
def reference(decoder) -> TorchDecoder:
    return torch_of(decoder, CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Rotary positions of two axes, unlike the sequence's, as in Qwen2-VL."""
    rng = np.random.default_rng(2)
    made = []
    for mask, answer in zip(MASKS, ANSWERS, strict=True):
        ids = rng.integers(0, CONFIG.vocabulary, len(mask)).astype(np.int32)
        steps = rng.integers(0, 2, (2, len(mask)))
        rope = np.cumsum(steps, axis=1).astype(np.int32)
        made.append(Prompt(ids, mask, rope, int(rope.max()) + 1, answer))
    return made


@pytest.fixture(scope="module")
def vectors() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((len(mask), CONFIG.width)).astype(np.float32) for mask in MASKS]


def bare(prompts: list[Prompt]) -> list[Prompt]:
    """Without the answers."""
    cut = [len(p.token_ids) - p.answer_length for p in prompts]
    return [
        Prompt(p.token_ids[:n], p.is_visual[:n], p.rope_positions[:, :n], p.next_rope, 0)
        for p, n in zip(prompts, cut, strict=True)
    ]


def batch_of(prompts: list[Prompt], vectors: list[np.ndarray]) -> tuple[PromptBatch, jax.Array]:
    """The batch in a bucket with room to spare, and the visual tokens, with noise in empty slots."""
    bucket = bucket_for([p.is_visual for p in prompts], spare=(2, 3))
    batch = jax.tree.map(jnp.asarray, collate_alone(prompts, bucket, max(ANSWERS)))
    rows = [row[: len(p.is_visual)] for row, p in zip(vectors, prompts, strict=True)]
    noise = np.random.default_rng(4)
    packed = pack(rows, batch.layout, lambda shape: noise.standard_normal(shape).astype(np.float32))
    return batch, jnp.asarray(packed[:, bucket.text :])


@partial(jax.jit, static_argnames=("graph", "plan", "pruning"))
def run(graph, state, visual, batch, plan, pruning):
    """Logits of all slots of the last part, its layout, and were the scores numbers."""
    decoder = nnx.merge(graph, state)
    states = run_prompt(decoder, visual, batch, plan, REDUCTION, KEY, pruning=pruning)
    return decoder.logits(states.x), states.parts[-1].layout, states.scored


@partial(jax.jit, static_argnames=("graph", "plan", "pruning"))
def run_greedy(graph, state, visual, batch, plan, pruning):
    decoder = nnx.merge(graph, state)
    first, caches, _ = prefill(decoder, visual, batch, plan, REDUCTION, NEW_TOKENS, KEY, pruning=pruning)
    return decode(decoder, first, caches, batch, NEW_TOKENS, ())[0], caches


def settings_for(plan: Plan, pruning: Pruning | None) -> Settings:
    drops = []
    for step, stage in enumerate(decoder_stages(pruning, CONFIG.num_layers)):
        match pruning:
            case FastV():
                drop = fastv(stage.kept, pruning.attention == "all_tokens")
            case PyramidDrop():
                drop = pyramid(stage.kept)
            case SparseVLM():
                drop = sparse(partial(pruning.chosen, step), pruning.merges)
            case DART():
                drop = dart(stage.kept)
            case _:
                drop = withdraw
        drops.append((stage.layer, drop))
    return Settings(
        attention_layers=plan.attention,
        ffn_layers=plan.ffn,
        attention_range=REDUCTION.attention_range,
        active_fraction=str(REDUCTION.active_fraction),
        drops=tuple(drops),
        renumbered=getattr(pruning, "positions", "kept") == "renumbered",
    )


def torch_inputs(reference: TorchDecoder, prompt: Prompt, vectors: np.ndarray):
    is_visual = torch.from_numpy(prompt.is_visual)
    text = reference.embed(torch.from_numpy(prompt.token_ids).long())
    x = torch.where(is_visual[:, None], torch.from_numpy(vectors[: len(is_visual)]), text)
    return x, is_visual, torch.from_numpy(prompt.rope_positions.T.copy()).float()


CASES = [
    (Plan(), FastV(1, 0.7)),
    (PLAN, FastV(2, 0.5)),
    (Plan(), FastV(2, keep=6, attention="all_tokens")),
    (Plan(), VTW(3)),
    (PLAN, VTW(2)),
    (PLAN, PyramidDrop()),
    (PLAN, SparseVLM((20, 10, 6))),
    (PLAN, SparseVLM(keep=(0.6, 0.4, 0.2), version="1.5")),
    (PLAN, DART(keep=11)),
]


@pytest.mark.parametrize(("plan", "pruning"), CASES, ids=lambda value: value.label())
def test_answers_are_judged_as_in_pytorch(decoder, reference, prompts, vectors, plan, pruning):
    """Logits of everything that is left, the answers included, which are not what tokens are chosen by."""
    batch, visual = batch_of(prompts, vectors)
    logits, layout, scored = run(*nnx.split(decoder), visual, batch, plan, pruning)
    assert scored.all()
    for i, (prompt, ours) in enumerate(zip(prompts, unpack(logits, layout), strict=True)):
        last = len(prompt.token_ids) - 1 - prompt.answer_length
        expected = reference(*torch_inputs(reference, prompt, vectors[i]), last, settings_for(plan, pruning))
        assert expected.gap > 1e-4
        left = decoder_stages(pruning, CONFIG.num_layers)[-1].kept(prompt.num_visual)
        assert len(expected.positions) == prompt.num_text + left
        assert expected.logits.std() > 1
        assert_close(ours, expected.logits, 1e-4)


GENERATED = [(PLAN, FastV(2, 0.5)), (Plan(), VTW(2)), (PLAN, PyramidDrop())]


@pytest.mark.parametrize(("plan", "pruning"), GENERATED, ids=lambda value: value.label())
def test_greedy_tokens_with_caches_are_those_of_pytorch(decoder, reference, prompts, vectors, plan, pruning):
    prompts = bare(prompts)
    batch, visual = batch_of(prompts, vectors)
    tokens, cache = run_greedy(*nnx.split(decoder), visual, batch, plan, pruning)
    for i, (prompt, ours) in enumerate(zip(prompts, tokens, strict=True)):
        x, is_visual, rope = torch_inputs(reference, prompt, vectors[i])
        expected = reference.greedy(x, is_visual, rope, prompt.next_rope, NEW_TOKENS, settings_for(plan, pruning))
        assert ours.tolist() == [expected]
    bucket, stages = batch.layout.bucket, decoder_stages(pruning, CONFIG.num_layers)
    kept = [bucket.visual] * CONFIG.num_layers
    for stage in stages:
        kept[stage.layer :] = [stage.kept(bucket.visual)] * (CONFIG.num_layers - stage.layer)
    assert (cache.stop - cache.start).tolist() == [bucket.text + visual + NEW_TOKENS for visual in kept]
    assert cache.k.shape[2] < CONFIG.num_layers * (bucket.slots + NEW_TOKENS)


RENUMBERED = [PyramidDrop(positions="renumbered"), FastV(1, 0.6, positions="renumbered"), VTW(2, "renumbered")]


@pytest.mark.parametrize("pruning", RENUMBERED, ids=lambda pruning: pruning.label())
def test_positions_are_renumbered_where_they_have_one_part(prompts, vectors, pruning):
    """Keys cached below a drop keep their positions; layers above continue behind the shortened sequence."""
    config = replace(CONFIG, rope_sections=(2,))
    decoder = random_decoder(config, 0.3)
    reference = torch_of(decoder, config)
    plain = [Prompt.plain(p.token_ids, p.is_visual) for p in prompts]
    batch, visual = batch_of(plain, vectors)
    tokens, _ = run_greedy(*nnx.split(decoder), visual, batch, PLAN, pruning)
    logits, layout, _ = run(*nnx.split(decoder), visual, batch, PLAN, pruning)
    settings = settings_for(PLAN, pruning)
    for i, (prompt, ours) in enumerate(zip(plain, unpack(logits, layout), strict=True)):
        inputs = torch_inputs(reference, prompt, vectors[i])
        expected = reference(*inputs, len(prompt.token_ids) - 1, settings)
        assert expected.gap > 1e-4
        assert_close(ours, expected.logits, 1e-4)
        assert tokens[i].tolist() == [reference.greedy(*inputs, len(prompt.token_ids), NEW_TOKENS, settings)]
        kept = reference(*inputs, len(prompt.token_ids) - 1, replace(settings, renumbered=False))
        if prompt.num_visual > 1:
            assert error(kept.logits, expected.logits) > 1e-2


@pytest.mark.parametrize("pruning", [FastV(2, 0), Folder(0)], ids=lambda pruning: pruning.label())
def test_dropping_nothing_is_no_pruning_bit_for_bit(decoder, prompts, vectors, pruning):
    batch, visual = batch_of(prompts, vectors)
    state = nnx.split(decoder)
    (ours, layout, _), (plain, same, _) = (run(*state, visual, batch, PLAN, p) for p in (pruning, None))
    np.testing.assert_array_equal(layout.slots.position, same.slots.position)
    for i, expected in enumerate(unpack(plain, same)):
        np.testing.assert_array_equal(unpack(ours, layout)[i], expected)
    dropping, other, _ = run(*state, visual, batch, PLAN, FastV(2, 0.5))
    assert error(unpack(dropping, other)[0][-1], unpack(plain, same)[0][-1]) > 1e-2


@pytest.mark.parametrize("pruning", [FastV(3, 0.5), Folder(0.5)], ids=lambda pruning: pruning.label())
def test_text_alone_is_left_as_it_is(decoder, reference, prompts, vectors, pruning):
    """A bucket without visual slots."""
    batch = collate_alone(prompts[2:3], bucket_for([prompts[2].is_visual]), max(ANSWERS))
    none = jnp.zeros((1, 0, CONFIG.width))
    logits, layout, scored = run(*nnx.split(decoder), none, jax.tree.map(jnp.asarray, batch), PLAN, pruning)
    expected = reference(*torch_inputs(reference, prompts[2], vectors[2]), 0, Settings())
    assert_close(unpack(logits, layout)[0], expected.logits, 1e-4)
    assert scored.all()


def test_merged_tokens_run_like_any_others(decoder, reference, prompts, vectors):
    batch, visual = batch_of(prompts, vectors)
    pruning = Folder(0.6)
    logits, layout, _ = run(*nnx.split(decoder), visual, batch, PLAN, pruning)
    for i, (prompt, ours) in enumerate(zip(prompts, unpack(logits, layout), strict=True)):
        x, is_visual, rope = torch_inputs(reference, prompt, vectors[i])
        merged, kept = merged_slowly(vectors[i], prompt.is_visual, "0.6")
        left = [t for t in range(len(x)) if not prompt.is_visual[t] or t in kept]
        x[kept] = torch.from_numpy(merged)
        expected = reference(x[left], is_visual[left], rope[left], 0, settings_for(PLAN, None))
        assert_close(ours, expected.logits, 1e-4)


@pytest.mark.parametrize("pruning", RENUMBERED, ids=lambda pruning: pruning.label())
def test_positions_of_several_parts_cannot_be_renumbered(pruning):
    PlanFile(pruning=replace(pruning, positions="kept")).validate(CONFIG)
    with pytest.raises(UserError, match=r'have 2 parts .M-RoPE., which cannot be renumbered; use "positions": "kept"'):
        PlanFile(pruning=pruning).validate(CONFIG)


@pytest.mark.parametrize("pruning", [FastV(4, 0.5), VTW(9)])
def test_a_layer_beyond_the_model_is_refused(decoder, prompts, vectors, pruning):
    batch, visual = batch_of(prompts, vectors)
    with pytest.raises(UserError, match=rf"after layer {pruning.layer}, but the model has 4 layers"):
        run(*nnx.split(decoder), visual, batch, Plan(), pruning)
