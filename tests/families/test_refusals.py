"""Checkpoints that no family supports, and videos: one line that says what to use instead."""

import json
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlens_jax.checkpoints.checkpoint import load_model
from rlens_jax.data.images import load_image
from rlens_jax.data.jsonl import read_jsonl
from rlens_jax.engine.deployed_model import make_sample
from rlens_jax.errors import UserError
from rlens_jax.families.refusals import refuse_quantised
from rlens_jax.families.registry import read_kind
from rlens_jax.kept_tokens import DivPrune, FasterVLM, Pooling, VisionZip
from rlens_jax.pruning import FastV
from tests.families.published import BY_MODEL_TYPE, kind_of

EXPERTS = "is a mixture of experts, which is not supported; use a dense model of the family, such as Qwen3-VL-8B-Instruct"
USE = "which is not supported; use the model that it was made from, with weights in bfloat16"


def nested(name: str, **changes: object) -> dict[str, Any]:
    """InternVL's config with fields of a section changed."""
    whole = BY_MODEL_TYPE["internvl_chat" if name == "llm_config" else "internvl"]
    return whole | {name: whole[name] | changes}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 128}}, f"config.json: 'qwen3_vl_moe' {EXPERTS}"),
        (nested("llm_config", model_type="qwen3_moe"), f"config.json: llm_config: 'qwen3_moe' {EXPERTS}"),
        (nested("llm_config", model_type="gpt_oss"), f"config.json: llm_config: 'gpt_oss' {EXPERTS}"),
        (nested("text_config", num_experts=8), f"config.json: text_config: 'qwen2' {EXPERTS}"),
        ({"model_type": "internvl_flash"}, "'internvl_flash' is InternVL3.5-Flash, which compresses visual tokens and is not"),
        (BY_MODEL_TYPE["internvl_chat"] | {"flash_mode": True}, "InternVL3.5-Flash compresses visual tokens and is not"),
        *(
            (kind | {"quantization_config": {"quant_method": method}}, f"the weights are quantised ('{method}'), {USE}")
            for kind, method in zip(list(BY_MODEL_TYPE.values())[:4], ("awq", "gptq", "fp8", "bitsandbytes"), strict=True)
        ),
        (
            nested("text_config", quantization_config={"load_in_4bit": True}),
            f"text_config: the weights are quantised ('load_in_4bit'), {USE}",
        ),
        ({"model_type": "qwen2_vl", "quantization_config": ["x"]}, f"the weights are quantised (['x']), {USE}"),
    ],
)  # fmt: skip
def test_a_kind_of_model_that_is_not_supported(config, expected) -> None:
    with pytest.raises(UserError) as error:
        read_kind(config, "config.json")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_only_images_that_become_grids_of_one_size_are_pooled(model_type: str) -> None:
    kind, side = kind_of(model_type), {"llava": 24, "internvl": 16, "internvl_chat": 16}.get(model_type)
    for pruning in (None, FastV(), DivPrune(4), Pooling(4, side=side or 24)):
        if side is None and isinstance(pruning, Pooling):
            with pytest.raises(UserError, match=f"those of {model_type} do not; possible are random, strided, divprune"):
                kind.check_pruning(pruning)
        else:
            kind.check_pruning(pruning)
    if side is not None:
        with pytest.raises(UserError, match=f"an image of this model is {side} x {side} visual tokens, so side must be {side}"):
            kind.check_pruning(Pooling(4, side=7))


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_only_visual_tokens_that_are_patches_are_chosen_by_attention(model_type: str) -> None:
    """The cost of the marks is that of the published tower, for the tokens of one view."""
    kind = kind_of(model_type)
    for pruning in (FasterVLM(64), VisionZip(64)):
        if model_type != "minicpmv":
            kind.check_pruning(pruning)
        else:
            with pytest.raises(
                UserError, match=f"{pruning.title} chooses .* those of minicpmv have no patches of their own; possible"
            ):
                kind.check_pruning(pruning)
    if model_type == "llava":
        # One query, and the keys of 576 patches, of width 1024.
        assert kind.tower_attention.cost(576) == 577 * 1024**2 + 576 * 1024
    if model_type == "qwen2_vl":
        assert kind.tower_attention.cost(100) == 800 * 1280**2 + 400 * 400 * 1280
    if model_type == "llava_onevision":
        assert kind.tower_attention.cost(1458) == 2916 * 1152**2 + 1458 * 729 * 1152


def test_a_dense_model_says_that_it_has_no_experts() -> None:
    kind = BY_MODEL_TYPE["qwen2_vl"]
    assert read_kind(kind | {"num_experts": 0, "quantization_config": None}, "config.json").config == read_kind(kind, "").config


PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_packed", "SCB", "weight.absmax")
PARTS = (*PARTS, "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.nested_absmax")


def test_names_of_tensors_of_quantised_weights() -> None:
    for part in PARTS:
        with pytest.raises(UserError, match="the weights are quantised"):
            refuse_quantised("a.safetensors", f"model.layers.1.mlp.up_proj.{part}", "I32")
    for config in BY_MODEL_TYPE.values():
        for name in read_kind(config, "config.json").table().tensors:
            refuse_quantised("a.safetensors", name, "BF16")


@pytest.mark.parametrize(
    ("part", "dtype", "name"), [("qweight", np.int32, "I32"), ("weight", ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_quantised_weights_of_which_config_json_says_nothing(part, dtype, name, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BY_MODEL_TYPE["qwen2_vl"]))
    tensor = f"model.layers.1.mlp.up_proj.{part}"
    save_file({tensor: np.zeros((2, 3), dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(tmp_path, jnp.float32)
    assert str(error.value).startswith(f"model.safetensors: {tensor} ({name}): the weights are quantised, {USE}")


ROW = {"image": "a.png", "question": "Why?", "answer": "7", "dataset": "mine"}
CHAT = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Why?"}]}]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"video": "a.mp4"}, "video"),
        ({"video_path": "a.mp4"}, "video_path"),
        ({"messages": CHAT}, "messages"),
        ({"question": CHAT[0]["content"]}, "question"),
        ({"question": [{"type": "video_url"}]}, "question"),
    ],
)
def test_a_row_with_a_video(row, field, tmp_path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(ROW | row))
    with pytest.raises(UserError, match=f"^{path}:1: field '{field}': videos are not supported, only images$"):
        read_jsonl(path)


def test_the_mark_of_a_video(tmp_path, capsys) -> None:
    """Where marks are read it is refused, and elsewhere it is text, which a line says."""
    path = tmp_path / "my.jsonl"
    (tmp_path / "a.png").touch()
    path.write_text(json.dumps(ROW | {"question": "<image> <video>", "marks": True}))
    with pytest.raises(UserError, match="field 'question' has the mark <video>: videos are not supported, only images"):
        read_jsonl(path)
    path.write_text(json.dumps(ROW | {"question": "<video>?"}))
    assert read_jsonl(path)[0].question == "<video>?"
    assert "note: " in (line := capsys.readouterr().err) and "<video> is text in 1 question(s); videos are not" in line
    with pytest.raises(UserError, match="the prompt: has the mark <video>: videos are not supported, only images"):
        make_sample("the prompt", [b""], "<image> <video>", True)
    make_sample("the prompt", [b""], "<video>?", False)
    assert "note: the prompt: <video> is text; videos are not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypisom", "MP4"),
        (b"\0\0\0\x14ftypqt  ", "MP4"),
        (b"\x1aE\xdf\xa3", "Matroska or WebM"),
        (b"RIFF\x24\0\0\0AVI LIST", "AVI"),
        (b"\0\0\x01\xba", "MPEG"),
        (b"\0\0\x01\xb3", "MPEG"),
        (b"FLV\x01\5", "FLV"),
        (b"OggS\0\2", "Ogg"),
        (b"0&\xb2u\x8ef\xcf\x11", "WMV"),
    ],
)
def test_a_video_in_place_of_an_image(content, name) -> None:
    with pytest.raises(UserError, match=f"^s:1: image is a video \\({name}\\); videos are not supported, only images$"):
        load_image(content + bytes(200), "s:1: image", "white", upright=True)
    with pytest.raises(UserError, match="a file of the format HEIC"):
        load_image(b"\0\0\0\x18ftypheic" + bytes(200), "s:1: image", "white", upright=True)
