"""Images and prompts of LLaVA-1.5 and LLaVA-NeXT checkpoints against Hugging Face's processors."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.families.anyres import cut_patches
from rlens_jax.models.prompt import Grid, Preparer
from tests.families.llava import IMAGE_TOKEN, PATCH, PINPOINTS, TEMPLATES, VIEW, image_processor, save_llava
from tests.families.llava_onevision import picture
from tests.families.measured import check_measured
from tests.families.odd_images import as_opened, odd_images, sample_of
from tests.families.published import kind_of

pytestmark = pytest.mark.torch

PROCESSOR = "preprocessor_config.json"
COUNTS = {
    (336, 336): 1176,
    (50, 50): 1176,
    (480, 640): 2340,
    (808, 1100): 2340,
    (672, 672): 2928,
    (899, 1024): 2634,
    (1000, 300): 2232,
    (300, 1000): 2182,
    (20, 1463): 576,
}
"""Visual tokens of LLaVA-NeXT by height and width; of the last one no row of the grid is left."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_llava(tmp_path_factory.mktemp(family), family, "vicuna", num_hidden_layers=1)
        return made[family]

    return get


def preparer_of(folder: Path) -> Preparer:
    return read_model_kind(folder).preparer(folder)


def test_published_counts_of_visual_tokens() -> None:
    for model_type, counts in (("llava", dict.fromkeys(COUNTS, 576)), ("llava_next", COUNTS)):
        kind = kind_of(model_type)
        measure = kind.family.measure(kind.config, {})
        for (height, width), count in counts.items():
            size, tokens = measure(width, height)
            assert tokens.count == count
            arrays = kind.image_arrays(size)
            assert arrays[0][0] == (*size, 588)
            assert tokens.count <= (arrays[1][0][0] if model_type == "llava_next" else size[0])
    assert kind.image_arrays((5, 576))[1][0] == (2928,)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_odd_images_give_the_pixels_of_transformers(folders, family: str) -> None:
    preparer, processor = preparer_of(folders(family)), image_processor(family)
    for name, data in odd_images().items():
        (image,) = preparer.images(load_images(sample_of(data), preparer.transparency), name)
        views = np.asarray(processor(images=[as_opened(data)], return_tensors="np")["pixel_values"])
        expected = cut_patches(views.reshape(-1, *views.shape[-3:]), PATCH).astype(np.float32)
        np.testing.assert_array_equal(image.arrays[0], expected.reshape(image.arrays[0].shape), err_msg=name)
    check_measured(folders(family), preparer)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def their_processor(folder: Path, family: str, template: str) -> Any:
    from transformers.models.llava.processing_llava import LlavaProcessor
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    return (LlavaProcessor if family == "llava" else LlavaNextProcessor)(
        image_processor(family),
        AutoTokenizer.from_pretrained(folder),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATES[template],
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("sizes", [(), ((20, 33),), ((20, 33), (50, 17))], ids=len)
@pytest.mark.parametrize(("family", "template"), [("llava", "vicuna"), ("llava_next", "mistral"), ("llava_next", "llama3")])
def test_prompts_and_answers_are_those_of_hugging_face(
    folders, family: str, template: str, sizes: tuple[Grid, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders(family), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES[template]}))
    pictures = [picture(number, size) for number, size in enumerate(sizes)]
    sample = Sample("s", "d", tuple(map(png, pictures)), "what is a page?", ("a page",))
    preparer = preparer_of(folder)
    tokens = [image.tokens for image in preparer.images(pictures, "s")]
    processor = their_processor(folder, family, template)
    content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": sample.question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "a page"}]}]

    def theirs(turns: list[dict[str, Any]]) -> list[int]:
        text = processor.apply_chat_template(turns, add_generation_prompt=len(turns) == 1)
        return processor(text=text, images=pictures or None, add_special_tokens=not text.startswith("<s>"))["input_ids"][0]

    prompt = preparer.prompt(sample, tokens, None)
    assert prompt.token_ids.tolist() == theirs(turns[:1])
    assert prompt.token_ids.tolist().count(1) == 1 and prompt.token_ids[0] == 1
    np.testing.assert_array_equal(prompt.is_visual, prompt.token_ids == IMAGE_TOKEN)
    answered = preparer.prompt(sample, tokens, "a page")
    expected, blank = theirs(turns), template != "llama3"
    end = expected.index(2) if template == "mistral" else len(expected) - blank  # Vicuna's template ends with a blank
    assert answered.token_ids[:-1].tolist() == expected[:end]
    assert answered.token_ids[-1] == 2
    tokenizer = processor.tokenizer
    words = "▁a ▁p a g e </s>" if blank else "a ▁p a g e </s>"
    assert tokenizer.convert_ids_to_tokens(answered.token_ids[-answered.answer_length :].tolist()) == words.split()


def test_what_a_model_says_becomes_text(folders) -> None:
    """Rows of the vocabulary that are padding stand for nothing."""
    chat = preparer_of(folders("llava")).chat
    assert chat.stop_tokens == (2,)
    page = chat.ids("a page")
    assert chat.decode([*page, 2, 7]) == "a page"
    assert chat.decode([*page, 325, 311, 2]) == "a page"


def edit(folder: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    path = target / PROCESSOR
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


def test_an_image_can_be_padded_instead_of_cropped(folders, tmp_path: Path) -> None:
    """As the original code of LLaVA-1.5 does."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    folder = edit(folders("llava"), tmp_path / "m", image_processor_type="LlavaImageProcessor", do_pad=True)
    fields, image = json.loads((folder / PROCESSOR).read_text()), picture(1, (20, 33))
    expected = LlavaImageProcessorPil(**fields)(images=[image], return_tensors="np")["pixel_values"]
    ((patches,),) = (image.arrays for image in preparer_of(folder).images([image], "s"))
    np.testing.assert_array_equal(patches, cut_patches(expected, PATCH)[0])
    ((cropped,),) = (image.arrays for image in preparer_of(folders("llava")).images([image], "s"))
    assert np.abs(patches - cropped).max() > 0.1


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "llava",
            {"crop_size": {"height": 28, "width": 28}},
            "only do_center_crop with a crop_size of 14 x 14 is supported, as config.json",
        ),
        ("llava", {"do_center_crop": False}, "only do_center_crop with a crop_size of 14 x 14"),
        (
            "llava_next",
            {"size": {"shortest_edge": 28}},
            "and config.json differ in image_grid_pinpoints or in the size of a view",
        ),
        ("llava_next", {"crop_size": {"height": 28, "width": 28}}, "and config.json differ in image_grid_pinpoints"),
        ("llava_next", {"image_grid_pinpoints": PINPOINTS[:3]}, "and config.json differ in image_grid_pinpoints"),
    ],
)
def test_a_processor_of_another_checkpoint_is_refused(folders, family, fields, message, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        preparer_of(edit(folders(family), tmp_path / "m", **fields))
    assert f"{PROCESSOR}" in str(refused.value) and message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_image_too_thin_for_a_square(folders) -> None:
    long = Image.new("RGB", (10_001, 1))
    with pytest.raises(UserError, match=r"^s7: an image of 10001 x 1 pixels is too thin to be made a square; crop it$"):
        preparer_of(folders("llava")).images([long], "s7")
    (image,) = preparer_of(folders("llava_next")).images([long], "s7")
    assert image.arrays[0].shape[1:] == (9, 48)
    assert VIEW // PATCH == 3
