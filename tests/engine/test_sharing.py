"""Sharing rows, and dropping candidates that cannot win, change no outcome and no ranking."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlens_jax.config import SearchConfig
from rlens_jax.data.samples import Sample
from rlens_jax.engine.evaluator import Evaluator
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.preparing import image_groups, prepare
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.racing import RoundScorer
from rlens_jax.engine.scoring import TeacherForcing
from rlens_jax.engine.shapes import Shapes
from rlens_jax.hosts.processes import Processes
from rlens_jax.models.prompt import FILLER, ImageTokens, Prompt
from rlens_jax.plans import OPERATORS, Operator, Plan
from rlens_jax.search.journal import Journal
from rlens_jax.search.search import Ranking, rank_layers
from tests.engine.toy import LAYERS, STOP, ToyPreparer, answered, png, shapes_of, toy_programs

SHAPES = shapes_of((16, 48), (12,), 3)
IMAGES = ((png(4, 6), png(2, 4)), (png(2, 4),), (png(4, 6), png(2, 6)), (png(6, 8),))
QUESTIONS = ("ab", "abcdefg", "hij", "xyz")
PLAN = Plan((1, 3), (0, 3, 4))
ENDS = (STOP, 3, 4, 5, 6, 7)
"""So many tokens end a turn that the random model's answers are short."""


def asked() -> list[Sample]:
    """Questions about each of several images, in no order of the images."""
    pairs = [pair for shift in range(4) for pair in zip(IMAGES, (*QUESTIONS[shift:], *QUESTIONS[:shift]), strict=True)]
    return [
        Sample(f"s{number}", "even" if number % 2 == 0 else "odd", images, question, ("?",))
        for number, (images, question) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def programs() -> Programs:
    return toy_programs(stop_tokens=ENDS)


@pytest.fixture(scope="module")
def random_probes() -> Programs:
    made = toy_programs()
    return Programs(made.model(), made.mesh, replace(made.reduction, probe="random"), seed=3, new_tokens=3, stop_tokens=(STOP,))


@pytest.fixture(scope="module")
def samples(programs: Programs) -> list[Sample]:
    """Every third one has a wrong answer first."""
    made = []
    for number, sample in enumerate(answered(asked(), programs, SHAPES)):
        tokens = sample.answers[0].split()
        text = " ".join(itertools.takewhile(lambda token: int(token) not in ENDS, tokens))
        made.append(replace(sample, answers=("12 12", text) if number % 3 == 0 else (text,)))
    return made


def split_of(samples: Sequence[Sample], programs: Programs, sharing: bool, shapes: Shapes = SHAPES) -> Split:
    return build_split(samples, ToyPreparer(), programs, shapes, True, sharing=sharing)


def log_probabilities(programs: Programs, split: Split) -> dict[int, list[float]]:
    """Of each sample's answers under a plan."""
    found: dict[int, list[float]] = {number: [] for number in range(len(split.samples))}
    for batch in split.batches:
        states = programs.layers(programs.embed(batch.inputs.text_ids, batch.visual), batch.inputs, PLAN, 0, LAYERS)
        numbers, _, values, finite = map(np.asarray, programs.outcome(states, batch.inputs))
        real = numbers != FILLER
        assert finite[real].all()
        for number, value in zip(numbers[real].tolist(), values[real].tolist(), strict=True):
            found[number].append(value)
    return {number: sorted(values) for number, values in found.items()}


@pytest.mark.parametrize("of", ["programs", "random_probes"])
def test_log_probabilities(of: str, samples: list[Sample], request: pytest.FixtureRequest) -> None:
    programs = request.getfixturevalue(of)
    shared, alone = (split_of(samples, programs, sharing) for sharing in (True, False))
    rows = [sum(int((pool.samples[:, :, 0] != FILLER).sum()) for pool in split.pools) for split in (shared, alone)]
    assert rows[0] <= rows[1] / 2
    expected = log_probabilities(programs, alone)
    for number, values in log_probabilities(programs, shared).items():
        assert len(values) == len(samples[number].answers)
        np.testing.assert_allclose(values, expected[number], atol=1e-4, rtol=0)


def ranked(
    programs: Programs, split: Split, folder: Path, operator: Operator, stopping: str = "exact", state_bytes: float = 1e9
) -> tuple[Ranking, int]:
    """The ranking, and the number of outcomes that it took."""
    with Journal.open(folder, {}) as journal:
        evaluator = Evaluator(TeacherForcing(programs), {"validation": split}, journal, state_bytes=state_bytes)
        dense = dict.fromkeys(split.datasets, 1.0)
        scorer = RoundScorer(evaluator, "validation", dense, SearchConfig(stopping=stopping, change="absolute"))
        return rank_layers(LAYERS, 1, operator, scorer), journal.num_outcomes


def decided(ranking: Ranking) -> list[object]:
    """What dropping candidates must not change."""
    return [ranking.order, ranking.curve(), [(round_.chosen, round_.ties) for round_ in ranking.rounds]]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_rankings(programs: Programs, samples: list[Sample], operator: Operator, tmp_path: Path) -> None:
    shared, alone = (split_of(samples, programs, sharing) for sharing in (True, False))
    numbers = itertools.count()

    def of(split: Split, **options: object) -> tuple[Ranking, int]:
        return ranked(programs, split, tmp_path / str(next(numbers)), operator, **options)

    full, everything = of(alone, stopping="none")
    assert of(shared, stopping="none") == (full, everything)
    assert len({score.score for round_ in full.rounds for score in round_.scores}) > 2
    for split in (shared, alone):
        stopped, some = of(split)
        assert decided(stopped) == decided(full)
        assert some < everything
        in_parts, _ = of(split, state_bytes=1.0)
        assert decided(in_parts) == decided(full)


@pytest.mark.slow
def test_a_killed_race_goes_on_where_it_was(programs: Programs, samples: list[Sample], tmp_path: Path) -> None:
    split = split_of(samples, programs, True)
    expected, outcomes = ranked(programs, split, tmp_path / "whole", "ffn")
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in range(2, len(lines), 5):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:kept]))
        assert ranked(programs, split, folder, "ffn") == (expected, outcomes)
        assert (folder / "journal.jsonl").read_bytes().count(b"\n") == len(lines)


def test_images_are_the_same_if_their_contents_are(tmp_path: Path) -> None:
    for folder, content in (("a", png(2, 4)), ("b", png(4, 2)), ("c", png(2, 4))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(content)
    a, b, c = (Sample(name, "d", (tmp_path / name / "1.png",), "?", ("1",)) for name in "abc")
    as_stored = replace(a, as_stored=True)
    assert image_groups([a, b, c, as_stored, replace(a, images=()), replace(a, images=())]) == [0, 1, 0, 3, 4, 5]


class ImageLast(ToyPreparer):
    """Prompts with their images at the end."""

    def prompt(self, sample: Sample, images: Sequence[ImageTokens], answer: str | None) -> Prompt:
        usual = super().prompt(replace(sample, question=""), images, answer)
        question = np.array([3 + ord(letter) % 10 for letter in sample.question], np.int32)
        ids = np.concatenate([question, usual.token_ids])
        return Prompt.plain(ids, np.concatenate([np.zeros(len(question), bool), usual.is_visual]), usual.answer_length)


def test_a_run_says_what_is_shared(samples: list[Sample]) -> None:
    """And with the images at the end of a question that nothing is."""
    told = [prepare(samples, preparer, True, Processes()).described() for preparer in (ToyPreparer(), ImageLast())]
    assert told == [
        "16 questions about 4 images in 10 rows",
        "16 questions about 4 images in 16 rows; nothing is shared, because no prompts about an image are equal up to its end",
    ]
