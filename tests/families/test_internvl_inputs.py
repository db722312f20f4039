"""InternVL's images and prompts, and what its config.json and folder must not ask for."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from rlens_jax.checkpoints.checkpoint import load_model, read_model_kind
from rlens_jax.data.images import load_images
from rlens_jax.data.samples import Sample
from rlens_jax.errors import UserError
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.decoder_fields import read_qwen2_decoder
from rlens_jax.families.internvl.model import Native
from rlens_jax.families.internvl.preparer import InternVLPreparer, closest_grid, cut_tiles
from rlens_jax.families.registry import read_kind
from rlens_jax.models.prompt import ImageTokens
from tests.families.internvl import (
    HF_TEMPLATE,
    IMAGE_TOKEN,
    NATIVE,
    SPECIAL,
    TILE,
    byte_tokenizer,
    hf_inputs,
    native_fields,
    patches_of,
    picture,
    save_native,
    save_tokenizer,
    tiny_internvl,
)
from tests.families.measured import check_measured
from tests.families.odd_images import as_opened, odd_images, sample_of
from tests.families.padding import padded
from tests.numerics import assert_close
from tests.torch_support import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.slow]

GRIDS = [
    # width, height, most tiles: columns, rows
    ((448, 448, 12), (1, 1)),
    ((630, 630, 12), (1, 1)),
    ((640, 640, 12), (2, 2)),  # the same ratio, and more than half of the pixels of 2 x 2 tiles
    ((1000, 1000, 12), (3, 3)),
    ((300, 300, 12), (1, 1)),
    ((1920, 1080, 12), (4, 2)),
    ((1080, 1920, 12), (2, 4)),
    ((1654, 2339, 12), (2, 3)),
    ((1000, 100, 12), (10, 1)),
    ((100, 3000, 12), (1, 12)),
    ((800, 600, 6), (3, 2)),
    ((800, 600, 12), (4, 3)),
    ((640, 480, 24), (4, 3)),
    ((5000, 4000, 24), (5, 4)),
    ((1, 1000, 1), (1, 1)),
]


@pytest.mark.parametrize(("image", "grid"), GRIDS)
def test_grid_of_tiles(image, grid):
    width, height, most = image
    assert closest_grid(width, height, 448, 1, most) == grid


def restated_grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """The closest ratio; among equally close ones the last, by number of tiles, that is less than twice too large.

    Without the order among grids of equal area, so not for ratios halfway between two such grids.
    """
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
    nearest = min(abs(width / height - c / r) for c, r in grids)
    closest = sorted((c * r, c, r) for c, r in grids if abs(width / height - c / r) == nearest)
    large = [(c, r) for area, c, r in closest[1:] if width * height > 0.5 * tile * tile * area]
    return large[-1] if large else closest[0][1:]


def test_grids_of_many_sizes():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        width, height = rng.integers(20, 3000, 2).tolist()
        least, most = int(rng.integers(1, 4)), int(rng.integers(4, 25))
        grid = closest_grid(width, height, 448, least, most)
        assert grid == restated_grid(width, height, 448, least, most), (width, height, least, most)
        seen.add(grid)
    assert len(seen) > 30


def test_tiles_are_crops_row_by_row_and_a_thumbnail():
    image = picture(1, 57, 30)
    tiles = cut_tiles(image, TILE, NATIVE)
    whole = image.resize((2 * TILE, TILE), Image.Resampling.BICUBIC)
    assert closest_grid(57, 30, TILE, 1, 6) == (2, 1)
    image = picture(1, 50, 33)
    tiles = cut_tiles(image, TILE, NATIVE)
    assert tiles.shape == (7, 3, TILE, TILE)
    assert tiles.dtype == np.float32
    whole = image.resize((3 * TILE, 2 * TILE), Image.Resampling.BICUBIC)
    crops = [whole.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE)) for y in range(2) for x in range(3)]
    crops.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    for tile, crop in zip(tiles, crops, strict=True):
        scaled = np.asarray(crop, np.float64) / 255
        expected = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert_close(tile, expected.transpose(2, 0, 1), 1e-6)
    assert len(cut_tiles(image, TILE, Native(1, 6, False, "internvl2_5"))) == 6
    assert len(cut_tiles(picture(1, TILE, TILE), TILE, NATIVE)) == 1
    assert len(cut_tiles(image, TILE, Native(1, 1, True, "internvl2_5"))) == 1


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = save_native(tmp_path_factory.mktemp("native"), tiny_internvl(0, num_hidden_layers=1))
    save_tokenizer(folder)
    # As published: its own classes are remote code.
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": "InternLM2Tokenizer"}
    fields["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    path.write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("hf"), tiny_internvl(0, num_hidden_layers=1))
    save_tokenizer(folder, HF_TEMPLATE)
    fields = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": False,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 6,
        "min_patches": 1,
        "size": {"height": TILE, "width": TILE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


def tiles(*counts: int) -> list[ImageTokens]:
    """Images of so many tiles, each with 16 visual tokens."""
    return [ImageTokens(16 * count) for count in counts]


def preparer(folder: Path) -> InternVLPreparer:
    return InternVLPreparer(folder, read_model_kind(folder).config)


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_images_are_sized_without_being_prepared(layout, request):
    folder = request.getfixturevalue(layout)
    check_measured(folder, preparer(folder))


def sample(question: str, images: int = 1) -> Sample:
    return Sample("s:1", "d", (b"",) * images, question, ("?",), marked="<image>" in question)


def spelled(ids) -> str:
    """The text of token ids, runs of image tokens as their number in brackets."""
    text, ids = "", list(ids)
    while ids:
        count = 0
        while ids and ids[0] == IMAGE_TOKEN:
            count, ids = count + 1, ids[1:]
        if count:
            text += f"[{count}]"
        run = []
        while ids and ids[0] != IMAGE_TOKEN:
            run, ids = [*run, ids[0]], ids[1:]
        text += byte_tokenizer().decode([int(i) for i in run], skip_special_tokens=False)
    return text


SYSTEM_2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
SYSTEM_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copied(folder: Path, tmp_path: Path, **fields) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    edit_config(copy, **fields)
    return copy


def test_native_prompt_of_newer_models(native):
    prompt = preparer(native).prompt(sample("Why?", 2), tiles(3, 1), "So.")
    assert spelled(prompt.token_ids) == (
        f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n"
        "<|im_start|>user\n<img>[48]</img>\n<img>[16]</img>\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
    )
    assert prompt.answer_length == 4
    assert prompt.num_visual == 64
    np.testing.assert_array_equal(prompt.is_visual, prompt.token_ids == IMAGE_TOKEN)
    np.testing.assert_array_equal(prompt.rope_positions, np.arange(len(prompt.token_ids))[None])
    assert prompt.next_rope == len(prompt.token_ids)


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_limits_of_tiles(layout, request):
    """A limit for each image, and one that the images of a prompt share."""
    folder = request.getfixturevalue(layout)
    kind, wide = read_model_kind(folder), picture(1, 8 * TILE, TILE)

    def counts(images: int, **limits: int) -> list[int]:
        return [image.tokens.count // 16 for image in kind.preparer(folder, limits).images([wide] * images, "s")]

    own = counts(1)
    assert counts(1, max_tiles=8) == [9] and counts(1, max_tiles=3) == [4] and own == [7]
    assert counts(3, max_tiles=4, total_tiles=64) == [5] * 3
    assert counts(3, max_tiles=4, total_tiles=7) == [3] * 3
    assert counts(3, total_tiles=2) == [1] * 3
    check_measured(folder, kind.preparer(folder, {"max_tiles": 3}), max_tiles=3)
    assert "max_tiles must be from 1, the checkpoint's least, to 128, not 500" in refusal(
        kind.preparer, folder, {"max_tiles": 500}
    )
    assert "has no such setting; it has max_tiles, total_tiles" in refusal(kind.preparer, folder, {"max_slices": 4})


def test_a_system_prompt_takes_the_place_of_the_native_one(native):
    asked = replace(sample("Why?", 1), system="Be brief.", turns=(("Who?", "Me."),))
    assert spelled(preparer(native).prompt(asked, tiles(1), None).token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<img>[16]</img>\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["Hermes-2", "internlm2-chat"])
def test_native_prompt_of_internvl2_has_no_newlines_between_turns(native, template, tmp_path):
    folder = copied(native, tmp_path, template=template)
    prompt = preparer(folder).prompt(sample("Look: <image> Why?"), tiles(1), None)
    assert spelled(prompt.token_ids) == (
        f"<|im_start|>system\n{SYSTEM_2}<|im_end|><|im_start|>user\nLook: <img>[16]</img> Why?<|im_end|><|im_start|>assistant\n"
    )
    assert prompt.answer_length == 0


def test_a_prompt_of_internlm2_begins_with_its_start_token(tmp_path):
    folder = save_native(tmp_path / "model", tiny_internvl(0, "llama", num_hidden_layers=1))
    save_tokenizer(folder)
    prompt = preparer(folder).prompt(sample("Why?"), tiles(1), None)
    assert spelled(prompt.token_ids).startswith("<s><|im_start|>system\n")


def test_prompt_by_the_chat_template_of_the_hf_layout(hf):
    prompt = preparer(hf).prompt(sample("Why?", 2), tiles(3, 1), "So.")
    assert spelled(prompt.token_ids) == (
        "<|im_start|>user\n<img>[48]</img>\n<img>[16]</img>\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
    )
    assert preparer(hf).chat.stop_tokens == (257,)


@pytest.mark.parametrize("template", [HF_TEMPLATE, "{{ bos_token }}" + HF_TEMPLATE], ids=["without", "with"])
def test_a_start_token_comes_once(hf, template, tmp_path):
    folder = copied(hf, tmp_path)
    save_tokenizer(folder, template, adds_start=True)
    prepare = preparer(folder)
    ids = prepare.prompt(sample("Why?"), tiles(1), "So.").token_ids
    plain = preparer(hf).prompt(sample("Why?"), tiles(1), "So.").token_ids
    assert ids.tolist() == [prepare.chat.tokenizer.bos_token_id, *plain]


def test_older_template_of_the_hf_layout(hf, tmp_path):
    folder = copied(hf, tmp_path)
    (folder / "chat_template.jinja").write_text(HF_TEMPLATE.replace("<IMG_CONTEXT>", "<image>"))
    ours = preparer(folder).prompt(sample("Why?"), tiles(1), None)
    np.testing.assert_array_equal(ours.token_ids, preparer(hf).prompt(sample("Why?"), tiles(1), None).token_ids)


def test_odd_images_give_the_pixels_of_transformers(hf):
    processor, prepare = GotOcr2ImageProcessorPil.from_pretrained(hf), preparer(hf)
    for name, data in odd_images().items():
        (image,) = prepare.images(load_images(sample_of(data), prepare.transparency), name)
        expected = processor(images=[as_opened(data)], crop_to_patches=True, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(image.arrays[0][: len(expected)], patches_of(expected), err_msg=name)


def test_transparency_is_dropped_in_the_native_layout(native):
    """As OpenGVLab's load_image: Image.open(file).convert("RGB")."""
    prepare = preparer(native)
    for name, data in odd_images().items():
        if name.startswith(("RGBA", "LA", "P with")):
            (image,) = prepare.images(load_images(sample_of(data), prepare.transparency), name)
            plain = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")
            expected = patches_of(cut_tiles(plain, TILE, NATIVE))
            np.testing.assert_array_equal(image.arrays[0][: len(expected)], expected, err_msg=name)


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_image_in_the_smallest_bucket_of_tiles(layout, request):
    folder = request.getfixturevalue(layout)
    (image,) = padded(preparer(folder).images([picture(2, 40, 90)], "s:1"), read_model_kind(folder), (64, 256, 512))
    (patches,) = image.arrays
    assert image.tokens.count == 48
    assert patches.shape == (4, 64, 12)
    expected = patches_of(cut_tiles(picture(2, 40, 90), TILE, NATIVE))
    assert_close(patches[:3], expected, 1e-6)
    assert not patches[3].any()


def test_from_picture_to_logits(native):
    """Preparer, tower and decoder together, against Hugging Face with the same tiles and the tokens spelled out above."""
    import jax
    import torch

    from rlens_jax.layout import Bucket, unpack_rows
    from rlens_jax.models.prompt import collate_alone
    from rlens_jax.plans import Plan, Reduction
    from tests.families.internvl import Example

    theirs, (kind, ours) = tiny_internvl(0, num_hidden_layers=1), load_model(native, jnp.float32)
    prepare = InternVLPreparer(native, kind.config)
    pictures = [picture(2, 40, 90), picture(3, 50, 11)]
    images = padded(prepare.images(pictures, "s:1"), kind, (512,))
    prompt = prepare.prompt(sample("a <image> b <image> c", 2), [image.tokens for image in images], None)
    example = Example(prompt.token_ids, prompt.is_visual, [cut_tiles(image, TILE, kind.config.native) for image in pictures])
    with torch.no_grad():
        expected = theirs(**hf_inputs([example])).logits[0].numpy()
    batch = collate_alone([prompt], Bucket(300, prompt.num_visual), 1)
    tokens = ours.vision(jnp.stack([image.arrays[0] for image in images]))
    own = [row[: image.tokens.count] for row, image in zip(tokens, images, strict=True)]
    decoder, batch = ours.decoder, jax.tree.map(jnp.asarray, batch)
    context = decoder.context(batch.layout, batch.rope_positions, jax.random.key(0))
    x = decoder.embed(batch.text_ids, jnp.concatenate(own)[None])
    x, _ = decoder.prefill(x, context, Plan(), Reduction())
    layout = jax.tree.map(np.asarray, batch.layout)
    assert_close(unpack_rows(np.asarray(decoder.logits(x)), layout)[0], expected, 1e-4)


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_no_bucket_holds_a_tile(native):
    assert "none of [32, 63] holds the patches of one view" in refusal(read_model_kind(native).image_sizes, (32, 63))


@pytest.mark.parametrize("layout", ["native", "hf"])
@pytest.mark.parametrize("text", ["<IMG_CONTEXT>", "</img><img>", "<|im_end|>", "<|im_start|>system", "<video>", "<s>"])
def test_special_tokens_of_a_user_are_letters(layout, text, request):
    prepare = preparer(request.getfixturevalue(layout))
    ids = prepare.prompt(sample(f"Why {text}?"), tiles(1), text).token_ids.tolist()
    plain = prepare.prompt(sample("Why ?"), tiles(1), "").token_ids.tolist()
    assert len(ids) == len(plain) + 2 * len(text.encode())
    for token in range(256, 256 + len(SPECIAL)):
        assert ids.count(token) == plain.count(token)
    assert spelled(ids).count(text) >= 2


def test_a_prompt_beyond_the_reach_of_plain_rope(native, tmp_path):
    llm = json.loads((native / "config.json").read_text())["llm_config"]
    scaled = llm | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 200}
    folder = copied(native, tmp_path, llm_config=scaled)
    message = refusal(preparer(folder).prompt, sample("Why?"), tiles(3), None)
    assert "with dynamic RoPE scaling at most 200 are supported" in message


def test_a_tokenizer_of_another_model(native, tmp_path):
    folder = copied(native, tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<image_pad>"))
    assert "the tokenizer has no token <IMG_CONTEXT>" in refusal(preparer, folder)


def test_a_tokenizer_that_differs_from_config(hf, tmp_path):
    folder = copied(hf, tmp_path, image_token_id=259)
    assert "config.json says image_token_id 259, but the tokenizer's <IMG_CONTEXT> is 260" in refusal(preparer, folder)


def test_no_chat_template(hf, tmp_path):
    folder = copied(hf, tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert "no chat template; copy chat_template.jinja" in refusal(preparer, folder)


def test_no_image_processor(hf, tmp_path):
    folder = copied(hf, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json; copy" in refusal(preparer, folder)


def test_images_of_another_size_than_the_position_embedding(hf, tmp_path):
    folder = copied(hf, tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 32, "width": 32}}))
    assert "the position embedding is for 16 x 16" in refusal(preparer, folder)


def changed(fields: dict, path: str, value) -> dict:
    """A copy with a field, in a nested object after a dot, set."""
    outer, _, inner = path.rpartition(".")
    return fields | ({outer: fields[outer] | {inner: value}} if outer else {inner: value})


NATIVE_REFUSALS = [
    ("select_layer", -4, "select_layer = -4 is not supported"),
    ("downsample_ratio", 0.25, "downsample_ratio = 0.25 is not supported"),
    ("ps_version", "v3", "ps_version = 'v3' is not supported"),
    ("template", "phi3-chat", "template 'phi3-chat' is not supported (only Hermes-2, internlm2-chat"),
    ("template", None, "template None is not supported"),
    ("force_image_size", 224, "force_image_size = 224 is not supported (only 16"),
    ("max_dynamic_patch", 0, "max_dynamic_patch must be a positive number, not 0"),
    ("min_dynamic_patch", 7, "min_dynamic_patch 7 is larger than max_dynamic_patch 6"),
    ("llm_config", None, "llm_config must be an object, not None"),
    ("llm_config.model_type", "phi3", "llm_config: model_type 'phi3' is not supported; text models are: qwen2"),
    ("llm_config.rope_scaling", {"type": "linear", "factor": 2}, "type = 'linear' is not supported"),
    ("llm_config.rope_theta", None, "the field rope_theta is missing"),
    ("llm_config.hidden_act", "gelu", "llm_config: hidden_act = 'gelu' is not supported"),
    ("vision_config.hidden_act", "quick_gelu", "vision_config: hidden_act = 'quick_gelu' is not supported"),
    ("vision_config.norm_type", "batch_norm", "norm_type = 'batch_norm' is not supported"),
    ("vision_config.image_size", 15, "image_size 15 is no multiple of 2 x 2"),
    ("vision_config.hidden_size", "24", "hidden_size must be a positive number, not '24'"),
]
HF_REFUSALS = [
    ("vision_feature_layer", -2, "vision_feature_layer = -2 is not supported"),
    ("vision_feature_select_strategy", "full", "vision_feature_select_strategy = 'full' is not supported"),
    ("projector_hidden_act", "relu", "projector_hidden_act = 'relu' is not supported"),
    ("image_token_id", None, "image_token_id must be a token id"),
    ("text_config.model_type", "gemma3", "text_config: model_type 'gemma3' is not supported"),
    ("text_config.use_sliding_window", True, "use_sliding_window = True is not supported"),
    ("vision_config.image_size", [448, 224], "image_size = [448, 224] is not supported (only squares)"),
    ("vision_config.use_mean_pooling", False, "use_mean_pooling = False is not supported"),
    ("vision_config.use_absolute_position_embeddings", False, "is not supported (only True)"),
    ("vision_config.use_mask_token", True, "use_mask_token = True is not supported"),
]


@pytest.mark.parametrize(("path", "value", "expected"), NATIVE_REFUSALS)
def test_native_configs_that_are_refused(path, value, expected):
    fields = native_fields(tiny_internvl(0, num_hidden_layers=1))
    if path == "vision_config.image_size":
        fields["force_image_size"] = value
    message = refusal(read_kind, changed(fields, path, value), "x/config.json")
    assert message.startswith("x/config.json: ")
    assert expected in message


@pytest.mark.parametrize(("path", "value", "expected"), HF_REFUSALS)
def test_hf_configs_that_are_refused(path, value, expected, hf):
    fields = json.loads((hf / "config.json").read_text())
    message = refusal(read_kind, changed(fields, path, value), "x/config.json")
    assert message.startswith("x/config.json: ")
    assert expected in message


@pytest.mark.parametrize(("model_type", "bias"), [("llama", "attention_bias"), ("llama", "mlp_bias"), ("internlm2", "bias")])
def test_biases_that_a_text_model_should_not_have(model_type, bias):
    fields = native_fields(tiny_internvl(0, num_hidden_layers=1))
    fields = changed(changed(fields, "llm_config.model_type", model_type), f"llm_config.{bias}", True)
    assert f"llm_config: {bias} = True is not supported" in refusal(read_kind, fields, "config.json")


def test_defaults_of_the_native_code():
    """What a config.json leaves out is not what InternVL2 uses, but what OpenGVLab's classes say."""
    fields = native_fields(tiny_internvl(0, num_hidden_layers=1))
    for name in ("dynamic_image_size", "use_thumbnail", "ps_version", "max_dynamic_patch", "force_image_size"):
        del fields[name]
    for name in ("norm_type", "qk_normalization", "qkv_bias", "layer_norm_eps"):
        del fields["vision_config"][name]
    config = read_kind(fields, "config.json").config
    assert config.native == Native(1, 1, False, "internvl2_5")
    vision = config.vision
    assert (vision.rms_norm, vision.qk_norm, vision.qkv_bias, vision.norm_eps) == (True, True, False, 1e-6)
    assert vision.transposed


def test_the_qwen2_reader_still_refuses_dynamic_scaling():
    """Qwen2-VL has no limit of length that would make it harmless."""
    fields = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "vocab_size": 9,
        "rms_norm_eps": 1e-6,
    }
    assert read_qwen2_decoder(ConfigReader(fields, "config.json")).rope_theta == 1e4
    scaled = ConfigReader(fields | {"rope_scaling": {"type": "dynamic"}}, "config.json")
    assert "type = 'dynamic' is not supported" in refusal(read_qwen2_decoder, scaled)


def test_special_tokens_of_the_tests():
    assert byte_tokenizer().token_to_id("<IMG_CONTEXT>") == IMAGE_TOKEN
    assert len(SPECIAL) == len(set(SPECIAL))
