"""What single samples show: kept units, and attention to visual tokens, of the embedded model's pages."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.data.images import load_images
from rlens_jax.data.page_samples import read_pages
from rlens_jax.engine.preparing import prompts_of
from rlens_jax.engine.seen import Seen, overlaps, see, token_grid
from rlens_jax.layout import visible
from rlens_jax.models.decoder import layer_at
from rlens_jax.models.forward import encode, forward, pack
from rlens_jax.models.prompt import ImageTokens
from rlens_jax.ops.attention import masked_attention
from rlens_jax.ops.ffn import hidden_units
from rlens_jax.plans import Plan, Reduction
from rlens_jax.resources import embedded_model

REDUCTION = Reduction(active_fraction=0.05)


@cache
def page():
    """The model, the prepared images of a page, and a prompt about it."""
    kind, model = load_model(embedded_model(), jnp.float32)
    preparer = kind.preparer(embedded_model())
    sample = read_pages("test", 1)["pages_read"][0]
    prepared = preparer.images(load_images(sample, preparer.transparency), sample.id)
    (prompt,) = prompts_of(sample, [image.tokens for image in prepared], preparer, False)
    return model, prepared, prompt


@cache
def seen() -> Seen:
    model, prepared, prompt = page()
    return see(model, prepared, prompt, REDUCTION)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 7])
def test_the_kept_units_are_those_of_a_dynamic_ffn(layer: int) -> None:
    """Of this layer alone, so that the layers below are dense, as where the sample is seen."""
    model, prepared, prompt = page()
    found = {}

    def observe(number, operator, states, kept):
        if operator == "ffn" and number == layer:
            found["units"] = np.asarray(kept.units)[0]

    forward(model, [prepared], [prompt], Plan(ffn=(layer,)), REDUCTION, observe=observe)
    np.testing.assert_array_equal(seen().kept[layer], found["units"])
    assert seen().kept.shape == (12, REDUCTION.kept_units(384))


@pytest.mark.slow
def test_the_first_layer() -> None:
    """Attention by values that mark one token each; survival from the hidden units of each token."""
    model, prepared, prompt = page()
    decoder, batch = model.decoder, pack([prompt])
    visual = encode(model, [prepared], batch.layout.bucket.visual)
    x = decoder.embed(batch.text_ids, visual)
    context = decoder.context(batch.layout, batch.rope_positions, jax.random.key(0))
    module, num_text = nnx.merge(*layer_at(nnx.split(decoder.layers), 0)), batch.layout.bucket.text
    q, k, _ = module.attention.project(module.input_norm(x), context.rotary)
    tokens = x.shape[1]
    width, key = k.shape[3], context.layout.slots
    marks = jnp.eye(tokens, -(-tokens // width) * width)  # of as many tokens at a time as values have numbers
    parts = [jnp.broadcast_to(part, k.shape) for part in jnp.split(marks[None, None], marks.shape[1] // width, axis=3)]
    attended = [masked_attention(q, k, part, visible(key, key, None)) for part in parts]
    weights = np.asarray(jnp.concatenate(attended, axis=3))[0, :, :, :tokens].mean(axis=0)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    last = int(np.asarray(batch.layout.visual_position)[0].max())
    behind = np.asarray(batch.layout.text_position)[0] > last
    behind[prompt.num_text :] = False
    assert 0 < behind.sum() < prompt.num_text
    expected = weights[:num_text][behind][:, num_text:].mean(axis=0)
    assert seen().attention[0] == pytest.approx(expected.sum(), abs=1e-5)
    assert seen().attention.shape == (12,) and 0 < seen().attention.min() < seen().attention.max() < 1
    assert seen().attention_map.sum() == pytest.approx(seen().attention.mean(), abs=1e-5)
    after = module.attend(x, context, REDUCTION, "full")[0]
    size = np.abs(np.asarray(hidden_units(module.ffn_norm(after)[:, num_text:], module.ffn.weights)))[0]
    share = size[:, seen().kept[0]].sum(axis=1) / size.sum(axis=1)
    # The map is the mean over the layers, of which this is one.
    assert seen().survival_map.shape == share.shape == (prompt.num_visual,)
    assert (12 * seen().survival_map - share > 0).all() and (12 * seen().survival_map - share < 11).all()
    assert share.mean() > 2 * REDUCTION.active_fraction  # the kept units are the active ones


def test_overlaps() -> None:
    kept = np.array([[[0, 1], [2, 3]], [[1, 5], [2, 3]], [[4, 5], [0, 1]]])
    expected = [[[1, 1], [0.5, 1], [0, 0]], [[0.5, 1], [1, 1], [0.5, 0]], [[0, 0], [0.5, 0], [1, 1]]]
    np.testing.assert_array_equal(overlaps(kept, 6), expected)


@pytest.mark.parametrize(
    ("tokens", "side", "grid"),
    [
        (ImageTokens(128, (16, 32)), None, (8, 16)),  # Qwen2-VL merges 2 x 2 patches
        (ImageTokens(512, (16, 32)), None, (16, 32)),
        (ImageTokens(192, (2, 1)), None, None),  # MiniCPM-V's slices
        (ImageTokens(576), 24, (24, 24)),
        (ImageTokens(576), None, None),  # nothing says that it is one view
        (ImageTokens(512), 16, None),  # two tiles
        (ImageTokens(0), None, None),
    ],
)
def test_token_grid(tokens: ImageTokens, side: int | None, grid: tuple[int, int] | None) -> None:
    assert token_grid(tokens, side) == grid
