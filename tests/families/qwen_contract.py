"""What the tests of all families of Qwen-VL show: their inputs are patches in merge order, and grids."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from rlens_jax.families.qwen2_vl.model import Qwen2VLConfig
from rlens_jax.families.qwen2_vl.preparer import rope_positions
from rlens_jax.models.decoder import TracedPlan
from rlens_jax.models.forward import VisionLanguageModel
from rlens_jax.models.generation import Penalty, decode, prefill
from rlens_jax.models.prompt import Prompt
from rlens_jax.plans import Plan, Reduction
from tests.families.contract import DENSE, PAPER, SIMPLE, ForwardContract, Logits
from tests.families.pair import Pair, cut
from tests.families.qwen2_vl import Example, Images, hf_inputs, make_example, our_batch, our_images, prompt_of
from tests.numerics import assert_close
from tests.sequences import unpack
from tests.torch_reductions import reduced

KEY = jax.random.key(0)
NEW_TOKENS = 40


def split(packed, batch) -> list[np.ndarray]:
    return unpack(packed, batch.layout)


@torch.no_grad()
def their_logits(pair: Pair, examples: Sequence[Example]) -> list[np.ndarray]:
    return cut(pair.theirs(**hf_inputs(examples)).logits, examples)


def run_tower(model: VisionLanguageModel, images: Images) -> tuple[jax.Array, jax.Array]:
    """States before the merger, and visual tokens."""
    return _run_tower(*nnx.split(model.vision), *images.tower_inputs)


@partial(jax.jit, static_argnames="graph")
def _run_tower(graph, state, *arrays):
    vision = nnx.merge(graph, state)
    features = vision.features(*arrays)
    return features, vision.merge(features)


def visual_of(model: VisionLanguageModel, images: Images) -> jax.Array:
    """Visual tokens [B, P, D] of the samples."""
    tokens = run_tower(model, images)[1]
    return tokens.reshape(-1, tokens.shape[-1])[images.source]


@partial(jax.jit, static_argnames=("graph", "plan", "reduction", "new_tokens"))
def run_prefill(graph, state, batch, visual, plan: Plan, reduction: Reduction, new_tokens: int):
    """Logits of all slots, were the probe scores numbers, and the cache."""
    decoder = nnx.merge(graph, state)
    context = decoder.context(batch.layout, batch.rope_positions, KEY, features=decoder.features(visual))
    x, record = decoder.prefill(decoder.embed(batch.text_ids, visual), context, plan, reduction)
    cache = decoder.make_cache(record, batch.layout, new_tokens)
    return decoder.logits(x), record.kept.scored.all(), cache


@partial(jax.jit, static_argnames=("graph", "stops", "penalty"))
def run_greedy(graph, state, batch, visual, stops: tuple[int, ...], penalty: Penalty):
    """The greedy tokens under a penalty, [B, Q, Y]."""
    decoder = nnx.merge(graph, state)
    first, caches, _ = prefill(decoder, visual, batch, DENSE, PAPER, NEW_TOKENS, KEY, penalty=penalty)
    return decode(decoder, first, caches, batch, NEW_TOKENS, stops, penalty)[0]


@partial(jax.jit, static_argnames=("graph", "reduction"))
def run_traced(graph, state, batch, visual, plan: TracedPlan, reduction: Reduction):
    """Logits of all slots, and were the probe scores numbers."""
    decoder = nnx.merge(graph, state)
    context = decoder.context(batch.layout, batch.rope_positions, KEY, features=decoder.features(visual))
    stop = plan.attention.shape[0]
    x = decoder.embed(batch.text_ids, visual)
    x, scored = decoder.run_layers(x, context, plan, reduction, jnp.int32(0), jnp.int32(stop))
    return decoder.logits(x), scored.all()


def start(
    model: VisionLanguageModel,
    config: Qwen2VLConfig,
    examples: Sequence[Example],
    plan: Plan | TracedPlan = DENSE,
    reduction: Reduction = PAPER,
):
    """Logits of all tokens (by `prefill` for a static plan, `run_layers` for a traced one), cache and batch."""
    spare = (2, 3)
    batch, images = our_batch(examples, config, spare), our_images(examples, config, spare[1])
    arguments = (*nnx.split(model.decoder), batch, visual_of(model, images), plan, reduction)
    if isinstance(plan, Plan):
        logits, scored, cache = run_prefill(*arguments, NEW_TOKENS)
    else:
        (logits, scored), cache = run_traced(*arguments), None
    assert scored
    return split(logits, batch), cache, batch


def our_logits(*arguments) -> list[np.ndarray]:
    return start(*arguments)[0]


def assert_all_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


def step_inputs(batch, step: int, new_tokens: int):
    """Position and rotary position of the token number `step` after the prompts, and the room in the cache."""
    rope = batch.next_rope + step
    return (batch.next_position + step, jnp.stack([rope] * batch.rope_positions.shape[1], axis=1), jnp.int32(new_tokens - step))


class QwenContract(ForwardContract):
    """Tower and merger, rotary positions and greedy tokens, besides what all families show."""

    parts: ClassVar[Mapping[str, list[list[int | tuple[int, int]]]]]
    """Examples of `batches` and of `mutated` as `make_example` takes them."""
    greedy: ClassVar[Sequence[Plan]] = (DENSE,)
    """Plans under which `mutated` generates."""

    def examples(self, pair: Pair, batch: str) -> list[Example]:
        return [make_example(seed, parts, pair.config) for seed, parts in enumerate(self.parts[batch], 1)]

    def ours(
        self, model: VisionLanguageModel, pair: Pair, examples: Sequence[Example], plan: Plan, reduction: Reduction
    ) -> Logits:
        return our_logits(model, pair.config, examples, plan, reduction)

    def theirs(self, pair: Pair, examples: Sequence[Example]) -> Logits:
        return their_logits(pair, examples)

    def prompt(self, pair: Pair, example: Example) -> Prompt:
        return prompt_of(example, pair.config)

    def visual(self, pair: Pair, examples: Sequence[Example]) -> list[np.ndarray]:
        tokens = np.asarray(visual_of(pair.ours, our_images(examples, pair.config)))
        return [row[: example.is_visual.sum()] for row, example in zip(tokens, examples, strict=True)]

    def their_features(self, pair: Pair, features: torch.Tensor, grids: torch.Tensor) -> np.ndarray:
        """The tower's output of PyTorch in merge order."""
        return features.numpy()

    @torch.no_grad()
    def test_vision_tower_and_merger(self, pair: Pair, batch: str) -> None:
        examples = self.examples(pair, batch)
        inputs, images = hf_inputs(examples), our_images(examples, pair.config)
        theirs = pair.theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
        features, merged = run_tower(pair.ours, images)
        group, counts = pair.config.vision.merge_size**2, images.num_patches.tolist()
        expected = self.their_features(pair, theirs.last_hidden_state, inputs["image_grid_thw"])
        assert_close(np.concatenate([row[:n] for row, n in zip(features, counts, strict=True)]), expected, SIMPLE)
        merged = np.concatenate([row[: n // group] for row, n in zip(merged, counts, strict=True)])
        assert_close(merged, theirs.pooler_output, SIMPLE)

    def test_rotary_positions(self, pair: Pair, batch: str) -> None:
        examples = self.examples(pair, batch)
        inputs = hf_inputs(examples)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        theirs, deltas = pair.theirs.model.get_rope_index(**{name: inputs[name] for name in names})
        for row, example in enumerate(examples):
            positions, following = rope_positions(example.is_visual, example.grids, pair.config.vision.merge_size)
            length = len(example.token_ids)
            np.testing.assert_array_equal(positions, theirs[:, row, :length])
            assert following == length + int(deltas[row])

    def test_greedy_tokens(self, pair: Pair) -> None:
        (example,) = self.examples(pair, self.mutated)
        for plan in self.greedy:
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
            with reduced(pair.theirs, [torch.tensor(example.is_visual)], plan.attention, plan.ffn, 5, "0.3", "0.1"):
                generated = pair.theirs.generate(**hf_inputs([example]), max_new_tokens=NEW_TOKENS, **options)
            expected = generated[0, len(example.token_ids) :].tolist()
            assert len(expected) == NEW_TOKENS
            assert len(set(expected)) > 5
            (logits,), cache, batch = start(pair.ours, pair.config, [example], plan, self.reduction)
            tokens = [int(logits[-1].argmax())]
            decode = jax.jit(pair.ours.decoder.decode)
            for step in range(NEW_TOKENS - 1):
                row, cache = decode(jnp.asarray([tokens[-1:]], jnp.int32), cache, *step_inputs(batch, step, NEW_TOKENS))
                tokens.append(int(row[0, 0].argmax()))
            assert tokens == expected

    def test_a_penalty_and_several_end_tokens(self, pair: Pair) -> None:
        """As generation_config.json of Qwen2.5-VL: a penalty of 1.05, and a list of end tokens. With 2, the prompt decides."""
        (example,), length = self.examples(pair, self.mutated), NEW_TOKENS
        generate = partial(pair.theirs.generate, **hf_inputs([example]), max_new_tokens=length, do_sample=False, pad_token_id=0)
        plain = generate(eos_token_id=None, repetition_penalty=1.0)[0, -length:].tolist()
        endless = {factor: generate(eos_token_id=None, repetition_penalty=factor)[0, -length:].tolist() for factor in (1.05, 2.0)}
        assert plain not in endless.values()
        late = next(token for place, token in enumerate(endless[1.05]) if place >= 32 and token not in endless[1.05][:place])
        for factor, stops in ((2.0, ()), (1.05, (late, 0))):
            expected = endless[factor]
            if stops:
                theirs = generate(eos_token_id=list(stops), repetition_penalty=factor)[0, len(example.token_ids) :].tolist()
                expected = expected[: expected.index(late) + 1]
                assert theirs == expected
            penalty = Penalty(factor, True, (pair.config.image_token,))
            batch, images = our_batch([example], pair.config), our_images([example], pair.config)
            tokens = run_greedy(*nnx.split(pair.ours.decoder), batch, visual_of(pair.ours, images), stops, penalty)
            assert np.asarray(tokens)[0, 0, : len(expected)].tolist() == expected
            assert set(np.asarray(tokens)[0, 0, len(expected) :].tolist()) <= {late}
