"""Which prompts share a row."""

from collections.abc import Hashable

import numpy as np

from rlens_jax.engine.trunks import Row, SamplePrompts, rows_of
from rlens_jax.models.prompt import Prompt

ANSWER = "="
"""Begins the answer in the spelling of a prompt; "v" is a visual token."""


def asked(*spellings: str, images: Hashable = ("one",)) -> list[SamplePrompts]:
    """A sample per spelling, one prompt per word."""
    return [SamplePrompts(number, images, tuple(map(prompt, text.split()))) for number, text in enumerate(spellings)]


def prompt(text: str) -> Prompt:
    bare, _, answer = text.partition(ANSWER)
    ids = np.array([ord(letter) for letter in bare + answer])
    return Prompt.plain(ids, ids == ord("v"), len(answer))


def spelled(row: Row) -> tuple[str, list[str], tuple[int, ...]]:
    """Trunk, branches, and sample numbers."""
    texts = ["".join(map(chr, each.token_ids)) for each in row.branches.prompts]
    trunk = row.branches.trunk
    assert len({text[:trunk] for text in texts}) == 1
    return texts[0][:trunk], [text[trunk:] for text in texts], row.samples


def test_questions_about_the_same_image_share_what_they_begin_with() -> None:
    rows = rows_of(asked("svvvvqa", "svvvvqbc", "svvvvq"))
    assert list(map(spelled, rows)) == [("svvvvq", ["a", "bc", ""], (0, 1, 2))]


def test_other_contents_or_other_text_before_an_image_is_another_trunk() -> None:
    other = SamplePrompts(3, ("two",), (prompt("svvvvqd"),))
    rows = rows_of([*asked("svvvvqa", "tvvvvqb", "svvvvqc"), other])
    assert [row.samples for row in rows] == [(0, 2), (1,), (3,)]
    assert [row.seed for row in rows] == [0, 1, 3]
    # With the images at the end, equal only in the first of two, nothing is shared.
    assert [row.samples for row in rows_of(asked("avv", "bvv", "svvtvv", "svvuvv"))] == [(0,), (1,), (2,), (3,)]


def test_all_answers_of_a_sample_are_in_one_row_and_never_in_its_trunk() -> None:
    rows = rows_of(asked("vvvvvvq=7! vvvvvvq=7!3", "vvvvvvq=7!"))
    assert list(map(spelled, rows)) == [("vvvvvvq", ["7!", "7!3", "7!"], (0, 0, 1))]
    # Without images, samples share nothing with each other.
    rows = rows_of(asked("q=7 q=8", "q=7", images=()))
    assert list(map(spelled, rows)) == [("q", ["7", "8"], (0, 0)), ("q", ["7"], (1,))]


def test_rows_end_with_more_branch_tokens_than_trunk_and_fit() -> None:
    questions = asked(*(f"vvv{letter}12" for letter in "abcde"))
    assert [row.samples for row in rows_of(questions)] == [(0, 1), (2, 3), (4,)]
    assert [row.samples for row in rows_of(questions, most_text=5)] == [(0,), (1,), (2,), (3,), (4,)]
    assert {row.seed for row in rows_of(questions)} == {0}
    short = asked(*(f"vvvvvv{letter}" for letter in "abcde"))
    assert [row.samples for row in rows_of(short, most_branches=4)] == [(0, 1), (2, 3, 4)]


def test_without_sharing_every_prompt_has_a_row_and_the_same_seed() -> None:
    rows = rows_of(asked("vvq=7 vvq=8", "vvx"), sharing=False)
    assert list(map(spelled, rows)) == [("vvq", ["7"], (0,)), ("vvq", ["8"], (0,)), ("vvx", [""], (1,))]
    assert {row.seed for row in rows} == {0}
