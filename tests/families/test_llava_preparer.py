"""Images and prompts of a LLaVA-OneVision checkpoint: against Hugging Face's processor, and on their way into batches."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import AutoTokenizer

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.engine.inputs import build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Shapes, row_buckets
from rlens_jax.errors import UserError
from rlens_jax.families.anyres import cut_patches
from rlens_jax.families.llava_onevision.preparer import LlavaOnevisionPreparer
from rlens_jax.models.prompt import FILLER, ImageTokens
from rlens_jax.models.prompt import Grid as Size
from rlens_jax.plans import Reduction
from rlens_jax.sharding.mesh import make_mesh
from tests.families.llava_onevision import (
    IMAGE_TOKEN,
    MOST_TILES,
    PINPOINTS,
    SIDE,
    VIDEO_TOKEN,
    VIEW,
    image_processor,
    picture,
    tiny_llava,
)
from tests.families.measured import check_measured
from tests.families.odd_images import as_opened, odd_images, sample_of
from tests.families.padding import padded
from tests.numerics import assert_close
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow]

WORDS = ("user", "assistant", "what", "is", "this", "a", "page")
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "\n", "<unk>", "<image>", "<video>")
PATCH_SLOTS = (SIDE**2, 7 * SIDE**2, 20 * SIDE**2)
TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}\
{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + item['text'] }}{% endfor %}\
{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"""
"""Like the published one: images before text."""


def write_texts(folder: Path) -> None:
    """Tokenizer and template; the special tokens have the ids of the tiny model's config."""
    vocabulary = [*WORDS, *(f"w{i}" for i in range(190 - len(WORDS))), *SPECIAL]
    assert vocabulary.index("<image>") == IMAGE_TOKEN
    assert vocabulary.index("<video>") == VIDEO_TOKEN
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"[^\S\n]+"), "removed"), Split("\n", "isolated")])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL if token != "\n"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": "{{ messages[0]['content'] + '' }}",  # of the language model alone
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return tiny_llava(4)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), theirs)
    image_processor().save_pretrained(folder)
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, jnp.float32)


@pytest.fixture
def preparer(folder, loaded) -> LlavaOnevisionPreparer:
    return LlavaOnevisionPreparer(folder, loaded[0].config)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(number: int, sizes: list[Size], question: str = "what is this") -> Sample:
    images = tuple(png(picture(10 * number + i, size)) for i, size in enumerate(sizes))
    return Sample(f"s{number}", "d", images, question, ("a page",), marked="<image>" in question)


def test_odd_images_give_the_pixels_of_transformers(preparer):
    for name, data in odd_images().items():
        (image,) = preparer.images(load_images(sample_of(data), preparer.transparency), name)
        (views,) = image_processor()(images=[[as_opened(data)]], return_tensors="np")["pixel_values"]
        expected = cut_patches(views, VIEW // SIDE)
        np.testing.assert_array_equal(image.arrays[0][: len(expected)], expected, err_msg=name)


def test_images_are_sized_without_being_prepared(folder, preparer):
    check_measured(folder, preparer)


SAMPLES = {
    "wide": make_sample(0, [(20, 33)]),
    "scaled down": make_sample(1, [(61, 47)]),
    "two images": make_sample(2, [(20, 33), (40, 15)], "what <image> is <image> this"),
    "tall": make_sample(3, [(50, 17)]),
    "three images": make_sample(4, [(9, 9), (14, 14), (5, 60)]),
}


def their_inputs(folder: Path, sample: Sample) -> dict[str, torch.Tensor]:
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor.image_processor, processor.num_image_tokens = image_processor(), SIDE**2
    processor.vision_feature_select_strategy, processor.image_token = "full", "<image>"
    processor.vision_aspect_ratio = f"anyres_max_{MOST_TILES}"
    pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
    inputs = dict(processor.image_processor(images=[pictures], return_tensors="np"))
    texts = [text for text in sample.question.split("<image>") if text]
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text} for text in texts]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    for image in range(len(pictures)):
        text = text.replace("<image>", processor.replace_image_token(inputs, image).replace("<image>", "@"), 1)
    ids = tokenizer(text.replace("@", "<image>"), add_special_tokens=False)["input_ids"]
    inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    return {**inputs, "pixel_values": inputs["pixel_values"].float(), "input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("name", SAMPLES)
def test_prompts_are_those_of_hugging_face(folder, preparer, name):
    sample = SAMPLES[name]
    pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
    tokens = [image.tokens for image in preparer.images(pictures, sample.id)]
    prompt = preparer.prompt(sample, tokens, None)
    expected = their_inputs(folder, sample)["input_ids"][0].numpy()
    np.testing.assert_array_equal(prompt.token_ids, expected)
    np.testing.assert_array_equal(prompt.is_visual, expected == IMAGE_TOKEN)
    np.testing.assert_array_equal(prompt.rope_positions, np.arange(len(expected))[None])
    assert prompt.next_rope == len(expected)
    answered = preparer.prompt(sample, tokens, "a page")
    assert answered.answer_length == 3
    assert answered.token_ids[-3:].tolist() == [WORDS.index("a"), WORDS.index("page"), SPECIAL.index("<|im_end|>") + 190]


def test_visual_tokens_of_a_run(folder, theirs, loaded, preparer):
    """All samples through `build_split`, against Hugging Face one sample at a time; one program a bucket."""
    mesh = make_mesh(jax.devices()[:1], 1)
    programs = Programs(loaded[1], mesh, Reduction(), seed=0, new_tokens=1, stop_tokens=(191,))
    kind = loaded[0]
    shapes = Shapes(row_buckets((32,), (64, 128)), tuple(kind.image_sizes(PATCH_SLOTS)), kind.image_arrays, 2)
    samples = list(SAMPLES.values())
    split = build_split(samples, preparer, programs, shapes, True)
    seen = set()
    for batch in split.batches:
        for row, place in enumerate(batch.inputs.samples[:, 0].tolist()):
            if place == FILLER:
                continue
            inputs = their_inputs(folder, samples[place])
            with torch.no_grad():
                features = theirs.model.get_image_features(
                    inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"]
                )
            expected = torch.cat(list(features.pooler_output)).numpy()
            assert_close(batch.visual[row, : len(expected)], expected, 1e-5)
            assert int(batch.inputs.layout.num_visual[row]) == len(expected)
            seen.add(place)
    assert seen == set(range(len(samples)))
    assert programs.traces["encode"] == 3


def test_buckets_count_patches(preparer, loaded):
    def shape(size):
        (image,) = padded(preparer.images([picture(0, size)], "s"), loaded[0], PATCH_SLOTS)
        return image.arrays[0].shape

    views = [shape(size) for size in [(14, 14), (20, 33), (61, 47)]]
    assert views == [(7, 9, 48), (7, 9, 48), (20, 9, 48)]
    first, second = preparer.images([picture(0, (14, 14)), picture(1, (61, 47))], "s")
    assert first.arrays[0].shape == second.arrays[0].shape == (1, 9, 48)
    assert preparer.images([], "s") == []


def test_no_image_outgrows_its_bucket(folder, loaded):
    """The visual slots of a bucket hold those of any image with so many views."""
    from transformers.image_processing_utils import select_best_resolution

    preparer = LlavaOnevisionPreparer(folder, loaded[0].config)
    rng = np.random.default_rng(1)
    for size in [(14, 900), (900, 14), *(tuple(map(int, rng.integers(3, 90, 2))) for _ in range(60))]:
        height, width = select_best_resolution(size, PINPOINTS)
        (image,) = preparer.images([picture(0, size)], "s")
        assert len(image.arrays[0]) == 1 + (height // VIEW) * (width // VIEW)
        assert image.tokens.count <= loaded[0].image_arrays(image.size)[1][0][0]


def test_several_images_of_which_one_is_too_long_for_a_square(preparer):
    long, small = Image.new("RGB", (10_001, 1)), Image.new("RGB", (9, 9))
    with pytest.raises(UserError, match="s7: of several images each is padded to a square, which is larger"):
        preparer.images([small, long], "s7")
    assert len(preparer.images([long], "s7")) == 1


def test_a_token_that_these_words_cannot_spell(preparer):
    sample = make_sample(5, [(20, 33)], "what is <video> this")
    with pytest.raises(UserError, match=r"s5: the prompt cannot be written \('<video>' in the text is always a token"):
        preparer.prompt(sample, [ImageTokens(12)], None)


def test_a_processor_of_another_checkpoint_is_refused(folder, loaded, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "image_grid_pinpoints": PINPOINTS[:3]}))
    with pytest.raises(UserError, match=r"preprocessor_config.json and config.json differ in image_grid_pinpoints"):
        LlavaOnevisionPreparer(tmp_path, loaded[0].config)
    path.unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config.json; copy that of the published model"):
        LlavaOnevisionPreparer(tmp_path, loaded[0].config)
