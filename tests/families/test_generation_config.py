"""What generation_config.json decides: values of wrong types, what greedy answers leave out, and which length counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlens_jax.errors import UserError
from rlens_jax.families.generation_config import GENERATION_FILE, Decoding, GenerationConfig, read_generation_config
from tests.families.published import FACTS


def written(folder: Path, **fields: Any) -> Path:
    (folder / GENERATION_FILE).write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"repetition_penalty": "1.05"}, "repetition_penalty must be a positive number, not '1.05'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number, not 0"),
        ({"repetition_penalty": True}, "repetition_penalty must be a positive number, not True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number from 1, not 2.5"),
        ({"max_length": [20]}, "max_length must be a whole number from 1, not [20]"),
        ({"max_length": 0}, "max_length must be a whole number from 1, not 0"),
        ({"do_sample": "no"}, "do_sample must be true or false, not 'no'"),
        ({"temperature": {}}, "temperature must be a number from 0, not {}"),
        ({"top_k": -1}, "top_k must be a whole number from 0, not -1"),
        ({"top_p": 80}, "top_p must be a number from 0 to 1, not 80"),
        ({"num_beams": "3"}, "num_beams must be a whole number from 1, not '3'"),
    ],
)
def test_values_of_wrong_types(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_generation_config(written(tmp_path, **fields))
    assert str(refused.value) == f"{tmp_path / GENERATION_FILE}: {complaint}"


def test_a_file_that_says_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig()
    nothing = dict.fromkeys(("repetition_penalty", "max_length", "do_sample", "num_beams", "stop_strings"))
    assert read_generation_config(written(tmp_path, **nothing, min_length=0, top_k=50)) == GenerationConfig()


@pytest.mark.parametrize(
    ("fields", "not_applied"),
    [
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            ("sampling (temperature 0.7, top_p 0.8, top_k 20)",),
        ),
        ({"do_sample": True}, ("sampling",)),
        ({"do_sample": True, "temperature": 0.01, "top_k": 1}, ()),
        ({"do_sample": True, "temperature": 1e-6}, ()),
        ({"do_sample": False, "temperature": 0.7}, ()),
        ({"num_beams": 3, "no_repeat_ngram_size": 2}, ("a search of 3 beams", "no_repeat_ngram_size 2")),
        ({"num_beams": 1, "suppress_tokens": [4]}, ("suppress_tokens [4]",)),
    ],
)
def test_what_greedy_answers_leave_out(fields: dict[str, Any], not_applied: tuple[str, ...], tmp_path: Path) -> None:
    assert read_generation_config(written(tmp_path, **fields)).not_applied == not_applied


def test_which_length_counts() -> None:
    """A given one, else the checkpoint's for new tokens, else its bound of prompt and answer together, as in transformers."""
    assert GenerationConfig().decoding(128) == Decoding(128)
    assert GenerationConfig(1.05, max_new_tokens=40, max_length=50).decoding(128) == Decoding(40, 1.05)
    assert GenerationConfig(1.05, max_new_tokens=40).decoding(128, 7, 1) == Decoding(7, 1.0)
    bounded = GenerationConfig(max_length=50)
    assert bounded.decoding(128, 7) == Decoding(7)
    assert [bounded.decoding(128).room(prompt) for prompt in (10, 49, 50, 60)] == [40, 1, 0, -10]
    assert (bounded.decoding(30).room(10), Decoding(7).room(10**6)) == (30, 7)
    for given, complaint in (
        ((0,), "max_new_tokens must be at least 1, not 0"),
        ((None, -1.0), "must be a positive number, not -1"),
    ):
        with pytest.raises(UserError, match=complaint):
            bounded.decoding(128, *given)


@pytest.mark.skipif(not FACTS.exists(), reason="the recorded facts are not in the repository")
def test_published_files() -> None:
    read = {
        name: read_generation_config(FACTS / name) for name in ("qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b", "minicpm-v-2_6")
    }
    assert [config.repetition_penalty for config in read.values()] == [1.0, 1.05, 1.0, 1.0]
    sampled = {name: config.not_applied for name, config in read.items() if config.not_applied}
    assert sampled == {"qwen3-vl-8b": ("sampling (temperature 0.7, top_p 0.8, top_k 20)",)}
