"""Files for texts and images that other programs wrote: their spellings are read, and what is wrong with them takes one line.

The families share what reads them, so a Qwen2-VL folder without weights stands for all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlens_jax.checkpoints.checkpoint import read_model_kind
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.errors import UserError
from rlens_jax.families import chat_files
from rlens_jax.families.chat_files import read_stop_tokens
from rlens_jax.models.prompt import Preparer
from tests.families.measured import check_measured

PROCESSOR, TOKENIZER, GENERATION = "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model without its weights."""
    for path in find_model("embedded").iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, tmp_path)
    return tmp_path


def preparer(folder: Path) -> Preparer:
    return read_model_kind(folder).preparer(folder)


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; `...` removes one."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in {**old, **fields}.items() if value is not ...}))


def test_images_are_sized_without_being_prepared(folder: Path) -> None:
    check_measured(folder, preparer(folder))
    edit(folder / PROCESSOR, min_pixels=..., max_pixels=..., size={"shortest_edge": 4096, "longest_edge": 8192})
    check_measured(folder, preparer(folder))


def refusal(folder: Path) -> str:
    """The one line, without the folder."""
    with pytest.raises(UserError) as refused:
        preparer(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{folder}", "").removeprefix("/")


def patches(folder: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8)
    return preparer(folder).images([Image.fromarray(pixels)], "s")[0].arrays[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"min_pixels": ..., "max_pixels": ..., "size": {"min_pixels": 1024, "max_pixels": 4096}},
        {"min_pixels": ..., "max_pixels": ..., "size": {"shortest_edge": 1024, "longest_edge": 4096}},
        {"min_pixels": 1024, "max_pixels": 4096, "size": ...},
        {"min_pixels": 1024, "max_pixels": 4096, "size": {"min_pixels": 7, "longest_edge": 8}},
        {"min_pixels": None, "max_pixels": 4096, "size": {"shortest_edge": 1024, "longest_edge": 8}},
    ],
)
def test_every_spelling_of_the_limits_of_pixels(folder: Path, fields: dict[str, Any]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    edit(folder / PROCESSOR, image_mean=[0.4, 0.5, 0.6], do_center_crop=None, **fields)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8))
    plain = json.loads((folder / PROCESSOR).read_text()) | {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
    for name in ("min_pixels", "max_pixels"):
        plain.pop(name, None)
    expected = Qwen2VLImageProcessorPil(**plain)(images=[pixels], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(patches(folder)[: len(expected)], expected)
    assert len(expected) <= 4096 / 16


def test_the_nested_processor_file_wins_and_is_named(folder: Path) -> None:
    before = patches(folder)
    nested = json.loads((folder / PROCESSOR).read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    edit(folder / "processor_config.json", image_processor=nested)
    assert (patches(folder) != before).any()
    edit(folder / "processor_config.json", image_processor=nested | {"image_mean": [0.1]})
    assert refusal(folder) == "processor_config.json: image_processor: image_mean must be three numbers, not [0.1]"
    edit(folder / "processor_config.json", image_processor=...)
    np.testing.assert_array_equal(patches(folder), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 16}, "patch_size 16 is not config.json's 4; take both files from one checkpoint"),
        ({"merge_size": 1}, "merge_size 1 is not config.json's 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size 1 is not config.json's 2"),
        ({"patch_size": "4"}, "patch_size must be a whole number from 1 to 134217728, not '4'"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be three positive numbers"),
        ({"image_mean": None}, "image_mean must be three numbers, not None"),
        ({"patch_size": None}, "patch_size must be a whole number"),
        ({"image_mean": 0.5}, "image_mean must be three numbers, not 0.5"),
        ({"do_rescale": "no"}, "do_rescale must be true or false, not 'no'"),
        ({"resample": 9}, "resample must be the number of a filter of Pillow, 0 to 5, not 9"),
        ({"rescale_factor": -1}, "rescale_factor must be a positive number"),
        ({"size": [16, 16]}, "size must be an object of whole numbers"),
        ({"size": {"height": 16, "width": 16}}, "size must be the smallest and the largest number of pixels of an image, not"),
        ({"min_pixels": 5000, "max_pixels": 4096}, "size must be the smallest and the largest number of pixels"),
        ({"max_pixels": 10**12}, "max_pixels must be a whole number from 1 to 134217728"),
    ],
)
def test_fields_of_the_image_processor(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit(folder / PROCESSOR, **fields)
    assert refusal(folder).startswith(f"{PROCESSOR}: {message}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (PROCESSOR, "[]", f"{PROCESSOR}: must hold a JSON object, not a list"),
        (PROCESSOR, None, f": no {PROCESSOR}; copy that of the published model"),
        (TOKENIZER, "[]", f"{TOKENIZER}: must hold a JSON object, not a list"),
        (TOKENIZER, None, f"cannot read /{TOKENIZER}: No such file"),
        (TOKENIZER, '{"tokenizer_class": 7}', ": no usable tokenizer ("),
        ("tokenizer.json", "{", ": no usable tokenizer ("),
        ("tokenizer.json", None, ": no usable tokenizer ("),
        ("chat_template.jinja", None, ": no chat template; copy chat_template.jinja of the published model"),
        (
            "chat_template.jinja",
            "{% if %}",
            "chat_template.jinja: the chat template has an error in line 1 (Expected an expression",
        ),
        ("chat_template.json", '{"chat_template": 3}', "chat_template.json: no chat template; copy"),
        (GENERATION, '{"eos_token_id": "</s>"}', f"{GENERATION}: eos_token_id must be the number of one of the"),
        (GENERATION, '{"eos_token_id": [1, 2.5]}', f"{GENERATION}: eos_token_id must be the number of one of the"),
        (GENERATION, '{"eos_token_id": []}', f"{GENERATION}: eos_token_id must be the number of one of the"),
        (GENERATION, '{"eos_token_id": 9999}', f"{GENERATION}: eos_token_id must be the number of one of the"),
    ],
)
def test_unusable_files(folder: Path, file: str, content: str | None, message: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    assert refusal(folder).startswith(message)


@pytest.mark.parametrize("token", [..., "", "<|never|>"])
def test_a_tokenizer_without_an_end_of_turn(folder: Path, token: Any) -> None:
    edit(folder / TOKENIZER, eos_token=token)
    missing = "the tokenizer's eos_token '<|never|>' has number" if token == "<|never|>" else "the tokenizer has no eos_token"
    assert missing in refusal(folder)


def test_templates_are_found_where_transformers_processors_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_files, "try_template", lambda template, where: None)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / TOKENIZER, chat_template="of the tokenizer")
    assert preparer(folder).chat.tokenizer.chat_template == "of the tokenizer"
    (folder / "chat_template.jinja").write_text("of a file")
    assert preparer(folder).chat.tokenizer.chat_template == "of a file"
    edit(folder / "chat_template.json", chat_template=template)
    assert preparer(folder).chat.tokenizer.chat_template == template
    edit(folder / "processor_config.json", chat_template="of the processor")
    assert preparer(folder).chat.tokenizer.chat_template == "of the processor"


def test_the_template_of_the_embedded_model_alone_needs_no_trial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(chat_files, "try_template", lambda template, where: tried.append(where))
    preparer(find_model("embedded"))
    assert tried == []
    preparer(folder)
    assert len(tried) == 1


def test_all_end_tokens_of_a_checkpoint(folder: Path) -> None:
    own = preparer(folder).chat.stop_tokens[0]
    for fields, expected in (
        ({}, []),
        ({"eos_token_id": None}, []),
        ({"eos_token_id": 7}, [7]),
        ({"eos_token_id": [own, 9, 7]}, [9, 7]),
    ):
        (folder / GENERATION).write_text(json.dumps(fields))
        assert preparer(folder).chat.stop_tokens == (own, *expected)
    edit(folder / GENERATION, eos_token_id=...)
    edit(folder / "config.json", eos_token_id=5)
    assert preparer(folder).chat.stop_tokens == (own, 5)
    tokenizer = preparer(folder).chat.tokenizer
    edit(folder / "config.json", eos_token_id=..., text_config={"eos_token_id": [6]})
    assert read_stop_tokens(folder, tokenizer, 20 + own) == (own, 6)


def test_limits_take_the_place_of_the_folders(folder: Path) -> None:
    """As sizes measured without preparing, and as a folder with these limits."""
    kind, image = read_model_kind(folder), Image.new("RGB", (90, 50))
    limits = {"min_pixels": 20_000, "max_pixels": 30_000}
    (limited,), (own,) = (kind.preparer(folder, given).images([image], "s") for given in (limits, {}))
    assert limited.tokens.count > own.tokens.count
    assert kind.measure(folder, limits)(90, 50) == (limited.size, limited.tokens)
    edit(folder / PROCESSOR, **limits)
    assert preparer(folder).images([image], "s")[0].tokens == limited.tokens


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"max_tiles": 4}, "max_tiles: a model of the type qwen2_vl has no such setting; it has min_pixels, max_pixels"),
        (
            {"min_pixel": 4},
            "min_pixel: a model of the type qwen2_vl has no such setting (did you mean 'min_pixels'?); it has min_pixels, "
            "max_pixels",
        ),
        ({"max_pixels": 0}, "max_pixels must be from 1 to 134217728, not 0"),
        ({"min_pixels": 10**9}, "min_pixels must be from 1 to 134217728, not 1000000000"),
        (
            {"min_pixels": 10**6, "max_pixels": 10**5},
            f"{PROCESSOR} with min_pixels 1000000 with max_pixels 100000: size must be the smallest and the largest number of "
            "pixels of an image, not {'shortest_edge': 1000000, 'longest_edge': 100000}",
        ),
    ],
)
def test_limits_that_do_not_fit(folder: Path, limits: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        read_model_kind(folder).preparer(folder, limits)
    assert str(refused.value).removeprefix(f"{folder}/") == complaint


def test_limits_of_images_that_are_not_resized(folder: Path) -> None:
    edit(folder / PROCESSOR, do_resize=False)
    with pytest.raises(UserError, match="do_resize is false, so max_pixels would change nothing; leave them out"):
        read_model_kind(folder).preparer(folder, {"max_pixels": 5000})


@pytest.mark.parametrize("size", [(1, 300), (5000, 1), (201, 1)])
def test_images_longer_than_the_processor_takes(folder: Path, size: tuple[int, int]) -> None:
    message = f"s:3: an image of {size[0]} x {size[1]} pixels: its longer side is more than 200 times the shorter one; crop it"
    with pytest.raises(UserError, match=f"^{message}$"):
        preparer(folder).images([Image.new("RGB", size)], "s:3")
    assert preparer(folder).images([Image.new("RGB", (200, 1)), Image.new("RGB", (1, 1))], "s:3")
