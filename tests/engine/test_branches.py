"""A row of branches has the results of its prompts alone, in teacher forcing and in generation, with padding around it."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlens_jax.data.samples import Sample
from rlens_jax.engine.programs import Programs
from rlens_jax.layout import Bucket
from rlens_jax.models.prompt import FILLER, Branches, ImageTokens, Places, Prompt, PromptBatch, collate
from rlens_jax.plans import Plan
from tests.engine.toy import LAYERS, ToyPreparer, toy_programs
from tests.numerics import assert_close

PLAN = Plan((1, 3), (0, 3, 4))
QUESTIONS = (("ab", "7 3"), ("abcdefg", "5"), ("abx", "11"), ("abc", "4 4 9"))
"""Questions that begin alike, and their answers."""
GRIDS = ((4, 6), (2, 4))
"""Rows and columns of patches of two images, four patches a token."""
NUM_VISUAL = 8
BUCKET, PLACES, ROWS = Bucket(40, 11), Places(5, 16, 8), 6


@pytest.fixture(scope="module", params=[(1, 1), pytest.param((8, 4), marks=pytest.mark.slow)], ids=["1", "2x4"])
def programs(request: pytest.FixtureRequest) -> Programs:
    """On one device, and on two work groups of four."""
    devices, model_shards = request.param
    return toy_programs(devices=devices, model_shards=model_shards, new_tokens=6)


def prompts(with_answers: bool) -> list[Prompt]:
    images = [ImageTokens(rows * columns // 4, (rows, columns)) for rows, columns in GRIDS]
    samples = [Sample(question, "d", (), question, (answer,)) for question, answer in QUESTIONS]
    return [ToyPreparer().prompt(sample, images, sample.answers[0] if with_answers else None) for sample in samples]


def batch_of(rows: Sequence[Branches], samples: Sequence[Sequence[int]], width: int) -> tuple[PromptBatch, np.ndarray]:
    """The rows and filler, and the visual tokens, with nonsense in all empty places."""
    filler, room = Branches.alone(Prompt.plain(np.zeros(1), np.zeros(1, bool))), ROWS - len(rows)
    batch = collate([*rows, *[filler] * room], [*samples, *[[FILLER]] * room], [0] * ROWS, BUCKET, PLACES)
    batch.text_ids[:, :][batch.layout.text_position > 10**6] = 12
    visual = np.full((ROWS, BUCKET.visual, width), 1e3, np.float32)
    visual[: len(rows), :NUM_VISUAL] = np.random.default_rng(5).standard_normal((NUM_VISUAL, width))
    return batch, visual


def alone(with_answers: bool, width: int) -> tuple[PromptBatch, np.ndarray]:
    rows = [Branches.alone(prompt) for prompt in prompts(with_answers)]
    return batch_of(rows, [[number] for number in range(len(rows))], width)


def together(with_answers: bool, width: int, trunk: int) -> tuple[PromptBatch, np.ndarray]:
    """Three prompts in one row, the fourth in another with the same trunk."""
    first, *rest = prompts(with_answers)
    rows = [Branches((first, *rest[:2]), trunk), Branches((rest[2],), trunk)]
    return batch_of(rows, [[0, 1, 2], [3]], width)


TRUNKS = [10, 11, 12]
"""Behind the last image, and after the letters with which all questions begin; 12 is the whole of the first prompt."""


@pytest.mark.parametrize("trunk", TRUNKS)
def test_teacher_forcing(programs: Programs, trunk: int) -> None:
    width = programs.config.visual_width

    def outcomes(batch: PromptBatch, visual: np.ndarray) -> dict[int, tuple[bool, float]]:
        states = programs.embed(batch.text_ids, visual)
        states = programs.layers(states, batch, PLAN, 0, LAYERS)
        samples, right, value, finite = map(np.asarray, programs.outcome(states, batch))
        real = samples != FILLER
        assert finite[real].all()
        return dict(zip(samples[real].tolist(), zip(right[real], value[real], strict=True), strict=True))

    expected, shared = outcomes(*alone(True, width)), outcomes(*together(True, width, trunk))
    assert shared.keys() == expected.keys() == set(range(len(QUESTIONS)))
    for number, (right, value) in expected.items():
        assert shared[number][0] == right
        assert_close(shared[number][1], value, 1e-5)
    assert len({round(float(value), 3) for _, value in expected.values()}) == len(QUESTIONS)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_generation(programs: Programs, trunk: int) -> None:
    width = programs.config.visual_width

    def generated(batch: PromptBatch, visual: np.ndarray) -> dict[int, list[int]]:
        samples, tokens, finite = map(np.asarray, programs.generate(programs.put(visual), batch, PLAN))
        real = samples != FILLER
        assert finite[real].all()
        return dict(zip(samples[real].tolist(), tokens[real].tolist(), strict=True))

    expected = generated(*alone(False, width))
    assert generated(*together(False, width, trunk)) == expected
    assert len(set(map(tuple, expected.values()))) > 1
