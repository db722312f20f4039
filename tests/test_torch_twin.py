"""The PyTorch reductions against an independent PyTorch implementation, and against our decoder."""

from functools import partial

import pytest
import torch

from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.qwen2_vl.model import read_config
from rlens_jax.plans import Plan, Reduction
from rlens_jax.torch_twin import decoder_layers, reduced
from tests import torch_reductions
from tests.families.llava import tiny_llava, tiny_llava_next
from tests.families.qwen2_vl import Example, hf_inputs, make_example
from tests.numerics import assert_close, error
from tests.torch_support import redraw, tiny_qwen2_vl

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SMALL = Reduction(attention_range=5, active_fraction=0.3)
BOTH = Plan(attention=(0, 2, 3), ffn=(1, 2, 4))
PLANS = [Plan(), Plan(attention=(1, 3, 4)), Plan(ffn=(0, 2)), BOTH]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_qwen2_vl(0)


@pytest.fixture(scope="module")
def examples(model) -> list[Example]:
    config = read_config(ConfigReader(model.config.to_dict(), "config.json"))
    parts = [[3, (6, 10), 5], [2, (4, 6), 1, (10, 2), 3, (2, 2), 11], [13]]
    return [make_example(seed, part, config) for seed, part in enumerate(parts, 1)]


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


def masks_of(examples: list[Example]) -> list[torch.Tensor]:
    return [torch.tensor(example.is_visual) for example in examples]


def real(batch: torch.Tensor, examples: list[Example]) -> torch.Tensor:
    return torch.cat([row[: len(e.token_ids)] for row, e in zip(batch, examples, strict=True)])


@pytest.mark.parametrize("plan", PLANS, ids=Plan.label)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_independent_implementation(model, examples, plan, attention) -> None:
    inputs = hf_inputs(examples)
    with torch_reductions.reduced(model, masks_of(examples), plan.attention, plan.ffn, 5, "0.3", "0.1") as expected:
        theirs = logits(model, inputs)
    dense = logits(model, inputs)
    model.set_attn_implementation(attention)
    with reduced(model, plan, SMALL) as record:
        ours = logits(model, inputs)
    model.set_attn_implementation("eager")
    assert_close(real(ours, examples), real(theirs, examples), 1e-5 if attention == "eager" else 1e-4)
    assert (error(real(ours, examples), real(dense, examples)) > 1e-2) == bool(plan.attention or plan.ffn)
    assert sorted(record.kept_units) == list(plan.ffn)
    assert expected.smallest_gap() > 1e-4
    for layer, selections in expected.selections.items():
        for row, selection in zip(record.kept_units[layer], selections, strict=True):
            assert row.tolist() == (list(range(23)) if selection is None else selection.units.tolist())
    assert torch.equal(logits(model, inputs), dense), "the model is not as it was"


def test_window_of_positions(model, examples) -> None:
    """Differs from the ordinal window only where text stands between visual tokens."""
    ordinal, position = Reduction(attention_range=5), Reduction(attention_range=5, window="position")
    plan, inputs = Plan(attention=(0, 1)), hf_inputs(examples)
    results = []
    for reduction in (ordinal, position):
        with reduced(model, plan, reduction):
            results.append(logits(model, inputs))
    assert torch.equal(results[0][0], results[1][0])
    assert error(results[0][1], results[1][1]) > 1e-3


def test_imposed_units(model, examples) -> None:
    inputs = hf_inputs(examples)
    with reduced(model, BOTH, SMALL) as record:
        own = logits(model, inputs)
    units = {layer: rows.flip(1) for layer, rows in record.kept_units.items()}
    with reduced(model, BOTH, SMALL, kept_units=units) as again:
        assert_close(real(logits(model, inputs), examples), real(own, examples), 1e-5)
    assert torch.equal(again.kept_units[4], record.kept_units[4])
    other = {2: (record.kept_units[2] + 1) % 77}
    with reduced(model, BOTH, SMALL, kept_units=other) as changed:
        assert error(real(logits(model, inputs), examples), real(own, examples)) > 1e-2
    assert torch.equal(changed.kept_units[2], record.kept_units[2]), "the own choice is recorded"


def test_padding_side_does_not_matter(model, examples) -> None:
    inputs = hf_inputs(examples)
    length = inputs["input_ids"].shape[1]
    left = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        left[name] = torch.stack([row.roll(length - len(e.token_ids)) for row, e in zip(inputs[name], examples, strict=True)])
    with reduced(model, BOTH, SMALL):
        right_padded, left_padded = logits(model, inputs), logits(model, left)
    unrolled = torch.stack([row.roll(len(e.token_ids) - length, 0) for row, e in zip(left_padded, examples, strict=True)])
    assert_close(real(unrolled, examples), real(right_padded, examples), 1e-5)


def test_generation_decodes_with_plain_layers(model, examples) -> None:
    inputs, new_tokens = hf_inputs(examples[1:2]), 8
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    with torch_reductions.reduced(model, masks_of(examples[1:2]), BOTH.attention, BOTH.ffn, 5, "0.3", "0.1"):
        expected = model.generate(**inputs, **options)
    with reduced(model, BOTH, SMALL):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_random_probes_are_reproducible(model, examples) -> None:
    inputs = hf_inputs(examples)
    kept = []
    for seed in (1, 1, 2):
        with reduced(model, Plan(ffn=(0,)), Reduction(active_fraction=0.3, probe="random"), seed=seed) as record:
            logits(model, inputs)
        kept.append(record.kept_units[0])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def tiny_text() -> dict:
    return {
        "model_type": "qwen2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 50,
        "pad_token_id": 0,
    }


def tiny_internvl() -> torch.nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [8, 8],
        "patch_size": [2, 2],
    }
    config = InternVLConfig(
        vision_config=vision, text_config=tiny_text(), image_token_id=45, image_seq_length=4, attn_implementation="eager"
    )
    return InternVLForConditionalGeneration(config)


def tiny_llava_onevision() -> torch.nn.Module:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "vision_use_head": False,
    }
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=tiny_text(), image_token_index=45, attn_implementation="eager"
    )
    return LlavaOnevisionForConditionalGeneration(config)


@pytest.mark.parametrize("make", [tiny_internvl, tiny_llava_onevision, partial(tiny_llava, 0), partial(tiny_llava_next, 0)])
def test_other_families(make) -> None:
    """The text path of the other classes, with embeddings in place of an image tower's output."""
    theirs = make().eval()
    redraw(theirs, 1)
    token = theirs.config.image_token_id
    ids = torch.tensor([[1, 2, *[token] * 12, 3, *[token] * 9, 4, 5]])
    visual = ids[0] == token
    with reduced(theirs, Plan(attention=(0,), ffn=(1,)), SMALL) as record:
        inner = theirs.model
        captured = []
        # The whole model puts the tower's output in place of these tokens' embeddings; here they stay.
        hook = theirs.model.language_model.layers[1].register_forward_hook(lambda *parts: captured.append(parts[2]))
        with torch.no_grad():
            theirs(input_ids=ids)
        hook.remove()
    layers = inner.language_model.layers
    with torch.no_grad():
        x = inner.language_model.embed_tokens(ids)
        turn = inner.language_model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill(
            ~torch_reductions.hollow_mask(visual, 5), torch.finfo(torch.float32).min
        )
        plain = torch.zeros_like(mask).masked_fill(~torch_reductions.hollow_mask(visual, None), torch.finfo(torch.float32).min)
        x = layers[0](x, attention_mask=mask, position_embeddings=turn)
        y = x + layers[1].self_attn(layers[1].input_layernorm(x), position_embeddings=turn, attention_mask=plain)[0]
        mlp = layers[1].mlp
        z, selection = torch_reductions.dynamic_ffn(
            layers[1].post_attention_layernorm(y)[0],
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            visual,
            "0.3",
            "0.1",
        )
    assert record.kept_units[1][0].tolist() == selection.units.tolist()
    assert_close(captured[0][0], y[0] + z, 1e-5)


def test_what_cannot_be_reduced_is_refused(model, examples) -> None:
    with pytest.raises(UserError, match=r"layer 5, but the model has 5 layers"), reduced(model, Plan(ffn=(5,)), SMALL):
        pass
    with pytest.raises(UserError, match="Linear: has no language_model"):
        decoder_layers(torch.nn.Linear(2, 2))
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="load the model with attn_implementation eager or sdpa"), reduced(model, BOTH, SMALL):
        pass
    model.set_attn_implementation("eager")
    inputs = hf_inputs(examples[:1])
    with reduced(model, BOTH, SMALL), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UserError, match="visual tokens after the first pass"):
            model(input_ids=torch.tensor([[195]]), past_key_values=cache)
        with pytest.raises(UserError, match="needs input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 60))


def test_scores_that_are_no_numbers(examples) -> None:
    spoilt = tiny_qwen2_vl(0)
    with torch.no_grad():
        decoder_layers(spoilt)[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="layer 1: probe scores are not numbers"), reduced(spoilt, BOTH, SMALL):
        logits(spoilt, hf_inputs(examples))


def test_another_image_token(model, examples) -> None:
    """Without visual tokens, both reductions are the identity."""
    inputs = hf_inputs(examples)
    with reduced(model, BOTH, SMALL, image_token=198) as record:
        assert_close(logits(model, inputs), logits(model, inputs), 0)
        ours = logits(model, inputs)
    assert_close(real(ours, examples), real(logits(model, inputs), examples), 1e-5)
    assert record.kept_units[1].tolist() == [list(range(23))] * len(examples)
