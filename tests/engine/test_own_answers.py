"""The dense model's own answers: where they end, and how they follow a prompt."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.data.samples import Sample
from rlens_jax.engine.own_answers import _read, until_end
from rlens_jax.engine.preparing import prompts_of
from rlens_jax.errors import UserError
from rlens_jax.models.prompt import ImageTokens
from tests.engine.toy import STOP, ToyPreparer

IMAGES = [ImageTokens(6, (4, 6)), ImageTokens(1, (2, 2))]


def test_an_answer_has_its_end_token_or_is_cut() -> None:
    assert until_end([5, 6, STOP, STOP], (STOP, 9)) == [5, 6, STOP]
    assert until_end([5, 9, STOP, STOP], (STOP, 9)) == [5, 9]
    assert until_end([5, 6, 7], (STOP, 9)) == [5, 6, 7]


@pytest.mark.parametrize("own", [(5, 6, STOP), (5, 6, 7)])
def test_it_follows_the_prompt_as_a_reference_answer_would(own: tuple[int, ...]) -> None:
    """Positions, also rotary ones behind two images, and no end token that was not generated."""
    sample = Sample("s", "mine", (), "abc", ("4 4",), own=own)
    (prompt,) = prompts_of(sample, IMAGES, ToyPreparer(), True)
    written = ToyPreparer().prompt(sample, IMAGES, " ".join(map(str, own[: own.index(STOP)] if STOP in own else own)))
    cut = len(written.token_ids) - (STOP not in own)
    np.testing.assert_array_equal(prompt.token_ids, written.token_ids[:cut])
    np.testing.assert_array_equal(prompt.rope_positions, written.rope_positions[:, :cut])
    np.testing.assert_array_equal(prompt.is_visual, written.is_visual[:cut])
    assert prompt.next_rope == written.next_rope - (STOP not in own)
    assert prompt.answer_length == len(own)
    (bare,) = prompts_of(sample, IMAGES, ToyPreparer(), False)
    assert bare.answer_length == 0 and len(bare.token_ids) == len(prompt.token_ids) - len(own)
    (reference,) = prompts_of(Sample("s", "mine", (), "abc", ("4 4",)), IMAGES, ToyPreparer(), True)
    assert reference.answer_length == 3


def test_the_file_is_read_for_the_same_model_and_samples_only(tmp_path: Path) -> None:
    path, identity = tmp_path / "own_answers.json", {"model_hash": "a"}
    assert _read(path, identity) is None
    answers = {"s": {"tokens": [5], "cut": True}}
    path.write_text(json.dumps({"schema": "rlens-own-answers/1", "identity": identity, "answers": answers}))
    assert _read(path, identity) == answers
    assert _read(path, {"model_hash": "b"}) is None
    path.write_text("{}")
    with pytest.raises(UserError, match=r"own_answers.json is damaged; delete it"):
        _read(path, identity)
