"""The processor files, as transformers reads them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlens_jax.checkpoints.checkpoint import find_model, read_model_kind
from rlens_jax.data.images import load_images
from rlens_jax.data.pages import VOCABULARY
from rlens_jax.demo.demo_model import SPECIAL_TOKENS, TOKENS, special_ids, write_processor
from tests.families.odd_images import as_opened, odd_images, sample_of

CHAT = [
    {"role": "system", "content": "the page"},
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "digit at row 3 column 5 ?"},
            {"type": "image"},
            {"type": "text", "text": "ink"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "4 0 7"}]},
]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return folder


@pytest.fixture(scope="module", params=["alone", "beside a model"])
def tokenizer(folder: Path, tmp_path_factory: pytest.TempPathFactory, request) -> PreTrainedTokenizerBase:
    """Beside a Qwen2-VL config.json, AutoTokenizer must not take Qwen2's own byte-level class."""
    if request.param == "beside a model":
        folder = tmp_path_factory.mktemp("model")
        write_processor(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    return AutoTokenizer.from_pretrained(folder)


def test_every_token_is_itself_and_nothing_else(tokenizer: PreTrainedTokenizerBase):
    assert len(tokenizer) == len(TOKENS)
    for index, token in enumerate(TOKENS):
        assert tokenizer(token)["input_ids"] == [index]
    assert tokenizer("digit zebra")["input_ids"] == [TOKENS.index("digit"), special_ids()["<unk>"]]


def test_odd_images_give_the_pixels_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = find_model("embedded")
    preparer = read_model_kind(folder).preparer(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    for name, data in odd_images().items():
        (image,) = preparer.images(load_images(sample_of(data), preparer.transparency), name)
        expected = processor(images=[as_opened(data)], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(image.arrays[0][: len(expected)], expected, err_msg=name)


def test_special_ids(tokenizer: PreTrainedTokenizerBase):
    ids = special_ids()
    assert set(ids) == set(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (ids["<|endoftext|>"], ids["<|im_end|>"])
    assert {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} == set(ids.values())
    assert set(tokenizer.all_special_ids) == set(ids.values())


def test_special_tokens_never_merge_with_words(tokenizer: PreTrainedTokenizerBase):
    pieces = ["digit", "<|im_end|>", "\n", "<|im_start|>", "user", "\n", "<|image_pad|>", "<|image_pad|>", "7"]
    assert tokenizer.tokenize("".join(pieces)) == pieces
    assert tokenizer.tokenize(" digit\t<|im_end|>  \n\n7 ") == ["digit", "<|im_end|>", "\n", "\n", "7"]


def test_decoding_joins_words_with_single_spaces(tokenizer: PreTrainedTokenizerBase):
    text = " ".join(VOCABULARY)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    answer = tokenizer("4 0 7<|im_end|>\n")["input_ids"]
    assert tokenizer.decode(answer[:-1], skip_special_tokens=True) == "4 0 7"


def test_chat_layout(tokenizer: PreTrainedTokenizerBase):
    prompt = (
        "<|im_start|>system\nthe page<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}digit at row 3 column 5 ?{IMAGE}ink<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    whole = f"{prompt}4 0 7<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == whole
    ids = tokenizer(whole)["input_ids"]
    start = tokenizer(prompt)["input_ids"]
    assert ids[: len(start)] == start
    assert tokenizer.convert_ids_to_tokens(ids[len(start) :]) == ["4", "0", "7", "<|im_end|>", "\n"]
    assert special_ids()["<unk>"] not in ids


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "7"}, "unknown role: tool"),
        ({"role": "user", "content": [{"type": "video"}]}, "only images and text"),
    ],
)
def test_chat_refuses_what_the_model_cannot_do(tokenizer: PreTrainedTokenizerBase, message, problem: str):
    with pytest.raises(jinja2.exceptions.TemplateError, match=problem):
        tokenizer.apply_chat_template([message], tokenize=False)


def run(program: str, folder: Path) -> None:
    """In a process of its own, because transformers chooses its image backend once in a process."""
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    with_torch = {**os.environ, "PYTHONPATH": ""}  # tests/conftest.py hides it
    result = subprocess.run(command, env=with_torch, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_image_processor_without_torch(folder: Path):
    run(
        """
        import sys
        sys.modules["torch"] = sys.modules["torchvision"] = None
        import numpy as np
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil")
        assert type(processor).__name__ == "Qwen2VLImageProcessorPil"
        ramp = np.arange(96 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 96, 3)
        out = processor([ramp], return_tensors="np")
        assert out["pixel_values"].shape == (576, 96), out["pixel_values"].shape
        assert out["image_grid_thw"].tolist() == [[1, 24, 24]]
        first = ramp[:4, :4].transpose(2, 0, 1) / 127.5 - 1
        patch = out["pixel_values"][0].reshape(3, 2, 4, 4)
        assert np.allclose(patch, first[:, None], atol=1e-6)
        small, large = (processor([np.zeros((s, s, 3), np.uint8)])["image_grid_thw"][0] for s in (20, 400))
        assert list(small) == [1, 16, 16] and list(large) == [1, 32, 32], (small, large)
        """,
        folder,
    )


def test_whole_processor_with_torch(folder: Path):
    run(
        """
        import sys
        import torch
        import numpy as np
        from PIL import Image
        from transformers import AutoProcessor
        from rlens_jax.demo.demo_model import special_ids

        processor = AutoProcessor.from_pretrained(sys.argv[1])
        assert type(processor).__name__ == "Qwen2VLProcessor"
        page = Image.fromarray(np.zeros((80, 112, 3), np.uint8))
        content = [{"type": "image", "image": page}, {"type": "text", "text": "read the page"}]
        out = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )
        assert out["image_grid_thw"].tolist() == [[1, 20, 28]]
        assert out["pixel_values"].shape == (560, 96)
        assert (out["input_ids"] == special_ids()["<|image_pad|>"]).sum() == 140
        assert special_ids()["<unk>"] not in out["input_ids"]
        """,
        folder,
    )
