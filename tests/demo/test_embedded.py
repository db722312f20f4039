"""The embedded model as others load it: Hugging Face's own classes, offline, with the same logits and the same answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.data.pages import DATASETS, make_page, make_question
from rlens_jax.data.samples import Sample
from rlens_jax.demo.measure import measure
from rlens_jax.layout import Bucket, unpack_rows
from rlens_jax.models.generation import decode, prefill
from rlens_jax.models.prompt import collate_alone
from rlens_jax.plans import Plan, Reduction
from rlens_jax.resources import embedded_model

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def questions() -> list[tuple[Image.Image, str]]:
    rng = np.random.default_rng(12)
    asked = []
    for dataset in DATASETS:
        page = make_page(rng, "test", augment=False)
        asked.append((Image.fromarray(page.pixels), make_question(rng, page, dataset).text))
    return asked


def test_logits_and_answers_equal_those_of_hugging_face(questions: list[tuple[Image.Image, str]]) -> None:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    folder = embedded_model()
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    kind, ours = load_model(folder, jnp.float32)
    preparer = kind.preparer(folder)
    for image, text in questions:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt_text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[prompt_text], images=[image], return_tensors="pt")
        sample = Sample("s", "d", (b"",), text, ("?",))
        (prepared,) = preparer.images([image], "s")
        prompt = preparer.prompt(sample, [prepared.tokens], None)
        np.testing.assert_array_equal(prompt.token_ids, inputs["input_ids"][0].numpy())
        np.testing.assert_allclose(prepared.arrays[0][: len(inputs["pixel_values"])], inputs["pixel_values"], atol=1e-2)

        # The same pixels on both sides: the two processors round a little differently.
        inputs["pixel_values"] = torch.from_numpy(prepared.arrays[0][: len(inputs["pixel_values"])])
        with torch.no_grad():
            expected = theirs(**inputs).logits[0].numpy()
            generated = theirs.generate(**inputs, do_sample=False, max_new_tokens=8)
        batch = jax.tree.map(jnp.asarray, collate_alone([prompt], Bucket(48, 128), 1))
        visual = ours.vision(*(jnp.asarray(array)[None] for array in prepared.arrays))
        visual = visual[:, : prepared.tokens.count]
        visual = jnp.pad(visual, ((0, 0), (0, 128 - visual.shape[1]), (0, 0)))
        context = ours.decoder.context(batch.layout, batch.rope_positions, jax.random.key(0))
        x, _ = ours.decoder.prefill(ours.decoder.embed(batch.text_ids, visual), context, Plan(), Reduction())
        layout = jax.tree.map(np.asarray, batch.layout)
        (logits,) = unpack_rows(np.asarray(ours.decoder.logits(x)), layout)
        assert np.abs(logits - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())

        first, cache, _ = prefill(ours.decoder, visual, batch, Plan(), Reduction(), 8, jax.random.key(0))
        tokens, _ = decode(ours.decoder, first, cache, batch, 8, preparer.chat.stop_tokens)
        new = generated[0, inputs["input_ids"].shape[1] :].tolist()
        assert np.asarray(tokens)[0, 0, : len(new)].tolist() == new


def test_it_reads_its_images_and_needs_its_layers() -> None:
    results = measure("embedded", 32)
    accuracy = results["accuracy"]
    assert accuracy["overall"] >= 0.85
    assert results["visual_share"] >= 0.75
    for name in DATASETS:
        assert accuracy[name] >= 0.75
        # Twice the bar's 5 points: that is the error of so few samples. `demo.measure --samples 600` measures the bar.
        assert results["swapped_images"][name] <= results["commonest_answer"][name] + 0.1
    costs = [accuracy["overall"] - without["overall"] for without in results["without_layer"]]
    assert sum(cost >= 0.05 for cost in costs) >= 6
