"""The forward pass to read computes what the fast prefill computes, and is short."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.layout import Bucket, unpack_rows
from rlens_jax.models import forward as forward_module
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.forward import VisionLanguageModel, attend, encode, feed, forward
from rlens_jax.models.prompt import ImageTokens, PreparedImage, Prompt, collate_alone
from rlens_jax.models.pruned import run_prompt
from rlens_jax.plans import Plan, Reduction
from tests.numerics import assert_close, error
from tests.sequences import run_length
from tests.toy_decoder import TOY, random_decoder

SMALL = Reduction(attention_range=3, active_fraction=0.3)
PLANS = [Plan(), Plan(attention=(1, 3)), Plan(ffn=(0, 4)), Plan(attention=(0, 1, 3), ffn=(1, 2))]
MASKS = [run_length(3, 31, 5), run_length(2, 7, 4, 11, 6), run_length(7), run_length(0, 11, 1)]
IMAGES = [[31], [7, 11], [], [11]]
NUMBERS_PER_PATCH = 6


class ToyVision(nnx.Module):
    """One token per patch; the last patches of an image are padding."""

    def __init__(self) -> None:
        kernel = np.random.default_rng(3).standard_normal((NUMBERS_PER_PATCH, TOY.width))
        self.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))

    def __call__(self, patches: jax.Array) -> jax.Array:
        return patches @ self.kernel[...]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(ToyVision(), random_decoder(TOY, 0.2))


@pytest.fixture(scope="module")
def images() -> list[list[PreparedImage]]:
    rng = np.random.default_rng(4)

    def image(num_tokens: int) -> PreparedImage:
        patches = rng.standard_normal((-(-num_tokens // 12) * 12, NUMBERS_PER_PATCH)).astype(np.float32)
        return PreparedImage((patches,), ImageTokens(num_tokens))

    return [[image(count) for count in sample] for sample in IMAGES]


@pytest.fixture(scope="module")
def text() -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [
        Prompt(rng.integers(0, TOY.vocabulary, len(m)).astype(np.int32), m, np.arange(len(m), dtype=np.int32)[None], 0, 0)
        for m in MASKS
    ]


def fast_logits(model: VisionLanguageModel, images, text, plan: Plan) -> list[np.ndarray]:
    """The prefill that deployment compiles, in a larger bucket, with every image encoded alone."""
    batch = collate_alone(text, Bucket(text=22, visual=37), 1)
    visual = np.zeros((len(text), 37, TOY.width), np.float32)
    for row, sample in zip(visual, images, strict=True):
        tokens = [np.asarray(model.vision(image.arrays[0]))[: image.tokens.count] for image in sample]
        joined = np.concatenate([np.zeros((0, TOY.width), np.float32), *tokens])
        row[: len(joined)] = joined
    graph, state = nnx.split(model.decoder)

    @jax.jit
    def run(state, visual, batch):
        decoder: Decoder = nnx.merge(graph, state)
        return decoder.logits(run_prompt(decoder, visual, batch, plan, SMALL, jax.random.key(0)).x)

    return unpack_rows(np.asarray(run(state, visual, batch)), batch.layout)


@pytest.mark.parametrize("plan", PLANS, ids=Plan.label)
def test_equals_the_fast_prefill(model, images, text, plan: Plan) -> None:
    logits = forward(model, images, text, plan, SMALL)
    for ours, fast, mask in zip(logits, fast_logits(model, images, text, plan), MASKS, strict=True):
        assert ours.shape == (len(mask), TOY.vocabulary)
        assert_close(ours, fast, 1e-5)
    dense = forward(model, images, text, Plan(), SMALL)
    assert (error(logits[0], dense[0]) > 1e-3) == (plan != Plan())
    assert_close(logits[2], dense[2], 1e-5)  # no visual tokens


def test_images_of_one_sample_keep_their_order(model, images) -> None:
    packed = encode(model, images, 40)
    expected = [np.asarray(model.vision(image.arrays[0]))[: image.tokens.count] for image in images[1]]
    assert_close(packed[1, :18], np.concatenate(expected), 1e-5)
    assert not packed[1, 18:].any()
    assert not packed[2].any()


def test_states_are_observed_and_units_imposed(model, images, text) -> None:
    plan, seen, units = PLANS[3], [], {}

    def observe(layer, operator, states, kept) -> None:
        seen.append((layer, operator))
        assert states.shape == (4, 12 + 31, TOY.width)
        assert (kept is None) == (operator == "attention")
        if kept is not None and layer in plan.ffn:
            units[layer] = np.asarray(kept.units)

    free = forward(model, images, text, plan, SMALL, observe=observe)
    assert seen == [(layer, half) for layer in range(TOY.num_layers) for half in ("attention", "ffn")]
    chosen, other = dict(units), {2: (units[2] + 1) % TOY.ffn_width}
    assert_close(forward(model, images, text, plan, SMALL, imposed=chosen)[0], free[0], 1e-6)
    imposed = forward(model, images, text, plan, SMALL, imposed=other, observe=observe)
    assert error(imposed[0], free[0]) > 1e-3
    np.testing.assert_array_equal(units[2], chosen[2])  # what the probes choose is observed all the same


def test_half_a_layer_is_compiled_once_for_all_layers(model, images, text) -> None:
    attend.clear_cache()
    feed.clear_cache()
    for plan in PLANS:
        forward(model, images, text, plan, SMALL)
    assert (attend._cache_size(), feed._cache_size()) == (2, 2)


def test_is_short() -> None:
    """`forward` and all that it needs of its own module."""
    _, functions = Path(forward_module.__file__).read_text().split("\n\n\ndef forward(")
    assert 30 < sum(1 for line in functions.splitlines() if line) <= 60
