"""Tokenizers from files that are data, beside tokenizer classes that are remote code."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers.utils import sentencepiece_model_pb2_new

from rlens_jax.errors import UserError
from rlens_jax.families.internvl.preparer import SPACE, read_tokenizer
from tests.families.internvl import SPECIAL, save_tokenizer

pytestmark = pytest.mark.torch

TEXTS = [
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nhello  world<|im_end|>",
    " hello\n\n",
    "hell ohé 书",
    "",
    "  ",
    "yellow hello</img>hello",
]
SCORED = {"he": -1, "ll": -2, "llo": -3, "el": -4, SPACE + "w": -5, "hello": -6, SPACE * 2: -7, "or": -8}
LETTERS = "helowrdy" + SPACE


def sentencepiece(folder: Path, *, prefix: bool = False, **changes) -> Path:
    """A folder with tokenizer.model as InternLM2 has it: two unused pieces are named otherwise in tokenizer_config.json."""
    proto = sentencepiece_model_pb2_new.ModelProto()
    proto.trainer_spec.model_type = changes.get("model_type", 2)
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = changes.get("remove_extra_whitespaces", False)
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    pieces += [(piece, score, 1) for piece, score in SCORED.items()]
    pieces += [(letter, -20 - i, 1) for i, letter in enumerate(LETTERS)]
    pieces += [(f"[UNUSED_TOKEN_{i}]", 0, 4) for i in range(2)]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {0: "<unk>", 1: "<s>", 2: "</s>"}
    names |= {len(pieces) - 2 + i + changes.get("gap", 0) * (i > 1): name for i, name in enumerate(SPECIAL)}
    fields = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "added_tokens_decoder": {
            str(number): {"content": name, "normalized": False, "special": True} for number, name in names.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def merged(text: str) -> list[str]:
    """Sentencepiece's BPE restated: always the best pair that is a piece, the leftmost of equal ones; bytes for the rest."""
    parts = list(text.replace(" ", SPACE))
    while True:
        pairs = [(SCORED[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in SCORED]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = {*SCORED, *LETTERS}
    return [piece for part in parts for piece in ([part] if part in known else [f"<0x{byte:02X}>" for byte in part.encode()])]


def restated(text: str, prefix: bool) -> list[str]:
    """Special tokens apart, each stretch between them by itself."""
    for name in SPECIAL:
        text = text.replace(name, f"\0{name}\0")
    pieces = []
    for part in text.split("\0"):
        if part in SPECIAL:
            pieces.append(part)
        elif part:
            pieces += merged((" " if prefix else "") + part)
    return pieces


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_model_of_internlm2(text, prefix, tmp_path):
    tokenizer = read_tokenizer(sentencepiece(tmp_path / "model", prefix=prefix))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == restated(text, prefix)
    if not prefix:
        assert tokenizer.decode(ids) == text


def test_renamed_pieces_keep_their_numbers(tmp_path):
    tokenizer = read_tokenizer(sentencepiece(tmp_path / "model"))
    number = 3 + 256 + len(SCORED) + len(LETTERS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(number, number + len(SPECIAL)))
    assert tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_0]") == 0
    assert tokenizer.bos_token_id == 1
    ids = tokenizer("<|im_start|>hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize("text", TEXTS)
def test_vocabulary_and_merges_give_what_tokenizer_json_gives(text, tmp_path):
    """The files of Qwen2's tokenizer, as native InternVL3 has them."""
    save_tokenizer(tmp_path / "one")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    two = tmp_path / "two"
    two.mkdir()
    (two / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(alphabet)}))
    (two / "merges.txt").write_text("#version: 0.2\n")
    added = {str(256 + i): {"content": name, "normalized": False, "special": True} for i, name in enumerate(SPECIAL)}
    fields = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    fields |= {"unk_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (two / "tokenizer_config.json").write_text(json.dumps(fields))
    ids = [read_tokenizer(tmp_path / name)(text)["input_ids"] for name in ("one", "two")]
    assert ids[0] == ids[1]
    assert max(ids[0], default=0) < 256 + len(SPECIAL)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_remote_code_only(tmp_path):
    (tmp_path / "tokenization_internlm2.py").write_text("raise SystemExit('this must not run')")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "no tokenizer; copy tokenizer.json, or" in refusal(tmp_path)


def test_a_broken_tokenizer_json(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "no usable tokenizer (" in refusal(tmp_path)


def test_a_broken_sentencepiece_model(tmp_path):
    folder = sentencepiece(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "no usable tokenizer (Error parsing message" in refusal(folder)


def test_sentencepiece_models_of_another_kind(tmp_path):
    assert "only BPE models are supported" in refusal(sentencepiece(tmp_path / "a", model_type=1))
    folder = sentencepiece(tmp_path / "b", remove_extra_whitespaces=True)
    assert "normalises text, which is not supported" in refusal(folder)


def test_added_tokens_with_a_gap_in_their_numbers(tmp_path):
    folder = sentencepiece(tmp_path / "model", gap=1)
    assert "added token '<img>' cannot get number" in refusal(folder)


def test_a_tokenizer_config_without_added_tokens(tmp_path):
    folder = sentencepiece(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    assert "no usable tokenizer ('added_tokens_decoder')" in refusal(folder)
