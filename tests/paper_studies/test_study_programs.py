"""The simulated control against loops in NumPy over the tokens of each sequence, and against the dense layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.layout import Bucket, pack_rows, unpack_rows
from rlens_jax.models.decoder import Context, Decoder, DecoderLayer, TracedPlan
from rlens_jax.models.prompt import Prompt, PromptBatch, collate_alone
from rlens_jax.paper_studies.study_programs import attend_text, feed_text, num_prompt_text, run_text_layers, text_visible
from rlens_jax.plans import FULL, Reduction
from tests.numerics import assert_close
from tests.toy_decoder import TOY

pytestmark = pytest.mark.slow

CONFIG = replace(TOY, num_layers=2, width=8, num_heads=2, num_kv_heads=1, ffn_width=12, vocabulary=11, rope_theta=100.0)
REDUCTION = Reduction(attention_range=1, active_fraction=0.25, probe_fraction=0.2)
LENGTHS = (34, 9)
ANSWERS = (3, 2)


def prompts() -> list[Prompt]:
    """Text on both sides of the visual tokens and between them; 24 prompt text tokens (R = 3) and 4 (R = 1)."""
    made = []
    for number, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        is_visual = np.zeros(length, bool)
        if number == 0:
            is_visual[[5, 6, 7, 9, 15, 16, 25]] = True
        else:
            is_visual[[1, 2, 4]] = True
        positions = np.arange(length, dtype=np.int32)[None]
        made.append(Prompt(np.arange(length, dtype=np.int32) % 11, is_visual, positions, length, answer))
    return made


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(1))
    # Weights of 0.02 would leave every attention row flat.
    draw = np.random.default_rng(2)
    state = nnx.state(made)
    state = jax.tree.map(lambda p: jnp.asarray(draw.standard_normal(p.shape) * 0.7, jnp.float32), state)
    nnx.update(made, state)
    return made


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    return collate_alone(prompts(), Bucket(text=30, visual=8), 4)


@pytest.fixture(scope="module")
def states(batch: PromptBatch) -> jax.Array:
    draw = np.random.default_rng(3)
    rows = [draw.standard_normal((length, CONFIG.width)).astype(np.float32) for length in LENGTHS]
    return jnp.asarray(pack_rows(rows, batch.layout))


def context(decoder: Decoder, batch: PromptBatch) -> Context:
    return decoder.context(batch.layout, batch.rope_positions, jax.random.key(0))


def layer_of(decoder: Decoder, number: int = 0) -> DecoderLayer:
    graph, stack = nnx.split(decoder.layers)
    return nnx.merge(graph, jax.tree.map(lambda p: p[number], stack))


def mask_by_loops(is_visual: np.ndarray, answer: int) -> np.ndarray:
    """bool [T, T] in the order of the sequence, from the words of the definition."""
    length = len(is_visual)
    is_prompt = [not is_visual[i] and i < length - answer for i in range(length)]
    attention_range = max(1, sum(is_prompt) // 8)
    mask = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(query + 1):
            if is_prompt[query] and is_prompt[key]:
                mask[query, key] = sum(is_prompt[key:query]) < attention_range
            else:
                mask[query, key] = True
    return mask


def test_prompt_text_leaves_the_answer_out(batch: PromptBatch) -> None:
    assert num_prompt_text(batch).tolist() == [24, 4]


def test_the_mask(batch: PromptBatch) -> None:
    mask = np.asarray(text_visible(batch.layout, num_prompt_text(batch)))
    layout = batch.layout
    for row, prompt in enumerate(prompts()):
        positions = np.concatenate([layout.text_position[row], layout.visual_position[row]])
        order = np.argsort(positions, kind="stable")[: LENGTHS[row]]
        expected = mask_by_loops(prompt.is_visual, prompt.answer_length)
        np.testing.assert_array_equal(mask[row][np.ix_(order, order)], expected)
        assert expected.sum() < np.tril(np.ones_like(expected)).sum()


def test_attention_is_that_of_the_loops(decoder: Decoder, batch: PromptBatch, states: jax.Array) -> None:
    module, shared = layer_of(decoder), context(decoder, batch)
    got = unpack_rows(np.asarray(attend_text(module, states, shared, num_prompt_text(batch))), batch.layout)
    q, k, v = module.attention.project(module.input_norm(states), shared.rotary)
    rows = [np.asarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    rows = [unpack_rows(x.reshape(*x.shape[:2], -1), batch.layout) for x in rows]
    weight = np.asarray(module.attention.o_proj.kernel[...], np.float64).reshape(-1, CONFIG.width)
    entering = unpack_rows(np.asarray(states), batch.layout)
    for row, prompt in enumerate(prompts()):
        mask = mask_by_loops(prompt.is_visual, prompt.answer_length)
        queries, keys, values = (x[row].astype(np.float64) for x in rows)
        mixed = np.zeros((LENGTHS[row], 8))
        for i in range(LENGTHS[row]):
            for head in range(2):
                query = queries[i, 4 * head : 4 * head + 4]
                seen = np.flatnonzero(mask[i])
                weights = np.exp([query @ keys[j] / 2 for j in seen])
                mixed[i, 4 * head : 4 * head + 4] = weights @ values[seen] / weights.sum()
        assert_close(got[row], entering[row] + mixed @ weight, 1e-5)


def test_the_ffn_is_that_of_the_loops(decoder: Decoder, batch: PromptBatch, states: jax.Array) -> None:
    module, shared = layer_of(decoder), context(decoder, batch)
    layer = jnp.int32(0)
    x, scored = feed_text(module, states, shared, REDUCTION, layer, num_prompt_text(batch))
    assert scored.all()
    got, dense = (
        unpack_rows(np.asarray(rows), batch.layout) for rows in (x, module.feed(states, shared, REDUCTION, FULL, layer)[0])
    )
    weights = [np.asarray(w, np.float64) for w in jax.tree.leaves(module.ffn.weights)]
    normed = unpack_rows(np.asarray(module.ffn_norm(states)), batch.layout)
    entering = unpack_rows(np.asarray(states), batch.layout)
    for row, prompt in enumerate(prompts()):
        last = len(prompt.is_visual) - prompt.answer_length
        text = [i for i in range(last) if not prompt.is_visual[i]]
        gate = normed[row] @ weights[0].T
        hidden = gate / (1 + np.exp(-gate)) * (normed[row] @ weights[1].T)
        count = max(1, len(text) // 5)
        probes = [text[i * len(text) // count] for i in range(count)]
        score = np.abs(hidden[probes]).mean(axis=0)
        best = np.argsort(-score, kind="stable")
        assert score[best[2]] - score[best[3]] > 1e-4
        dropped = best[3:]
        for i in text:
            hidden[i, dropped] = 0
        assert_close(got[row], entering[row] + hidden @ weights[2], 1e-5)
        others = [i for i in range(len(prompt.is_visual)) if i not in text]
        assert_close(got[row][others], dense[row][others], 1e-6)
        assert np.abs(got[row][text] - dense[row][text]).max() > 0.05


def test_a_traced_plan_chooses_the_layers(decoder: Decoder, batch: PromptBatch, states: jax.Array) -> None:
    shared, prompt = context(decoder, batch), num_prompt_text(batch)
    plan = TracedPlan(jnp.array([0, 1]), jnp.array([1, 0]))
    got, scored = run_text_layers(decoder, states, shared, prompt, plan, REDUCTION, jnp.int32(0), jnp.int32(2))
    assert scored.all()
    first, second = layer_of(decoder, 0), layer_of(decoder, 1)
    x = first.attend(states, shared, REDUCTION, FULL)[0]
    x = feed_text(first, x, shared, REDUCTION, jnp.int32(0), prompt)[0]
    x = attend_text(second, x, shared, prompt)
    x = second.feed(x, shared, REDUCTION, FULL, jnp.int32(1))[0]
    for one, other in zip(*(unpack_rows(np.asarray(y), batch.layout) for y in (got, x)), strict=True):
        assert_close(one, other, 1e-5)
