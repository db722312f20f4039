"""The order in which questions are answered, without a model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from rlens_jax.data.samples import Sample
from rlens_jax.engine.deployed_model import Answer, DeployedModel
from rlens_jax.engine.pools import Batch
from rlens_jax.engine.preparing import Resize, as_it_is
from rlens_jax.engine.prompt_batches import AskedPrompts, PromptSize
from rlens_jax.evaluation import answering
from rlens_jax.evaluation.answering import Questions, answer_questions
from rlens_jax.evaluation.answers import Answers
from rlens_jax.evaluation.datasets import ExactMatch
from rlens_jax.evaluation.evaluation import EvaluationConfig
from rlens_jax.evaluation.profiles import Manner
from rlens_jax.families.generation_config import Decoding
from rlens_jax.models.prompt import Preparer
from rlens_jax.plan_file import PlanFile
from rlens_jax.pruning import FastV

IMAGES = "ABACCBABC"
"""The image of each question, by a letter."""
PREPARERS = Mock(), Mock()
"""Of the two datasets."""


class FakeModel(DeployedModel):
    """Answers a question with itself; says that as many questions as given share a row."""

    programs: Any = SimpleNamespace(groups=1)

    def __init__(self, sharers: int):
        self.sharers = sharers
        self.windows: list[str] = []
        self.sharing: set[bool] = set()
        self.asked: list[tuple[Preparer, Decoding]] = []

    def prepared_by(self, preparer: Preparer) -> DeployedModel:
        self.preparer = preparer
        return self

    def prepare(
        self, samples: Sequence[Sample], decoding: Decoding, *, sharing: bool, marked: bool = False, resized: Resize = as_it_is
    ) -> AskedPrompts:
        self.windows.append("".join(sample.images[0].decode() for sample in samples if isinstance(sample.images[0], bytes)))
        self.sharing.add(sharing)
        batch = Mock(spec=Batch, members=np.arange(len(samples)))
        return AskedPrompts(tuple(samples), (PromptSize(9, 20, 7, self.sharers),) * len(samples), (batch,))

    def answer_batch(
        self, asked: AskedPrompts, batch: Batch, plan: PlanFile, decoding: Decoding
    ) -> tuple[dict[int, Answer], float, float]:
        self.asked.append((self.preparer, decoding))
        return {number: Answer(sample.question, 1, True) for number, sample in enumerate(asked.samples)}, 0.0, 0.0


def answered(folder: Path, model: FakeModel, **options: Any) -> list[str]:
    """The answers to questions about `IMAGES`, in their order, in two equal datasets of which the second is returned."""
    samples = [Sample(str(n), "d", (image.encode(),), f"question {n}", ("x",)) for n, image in enumerate(IMAGES)]
    first, second = (
        Questions.of(ExactMatch(name, samples), Manner(Decoding(length)), preparer)
        for name, length, preparer in zip("de", (4, 5), PREPARERS, strict=True)
    )
    config = EvaluationConfig("m", options.pop("plan", PlanFile()), ("d",), folder, batch_size=2, **options)
    with Answers.open(folder, {}) as answers:
        answer_questions(config.asking, model, [first, second], answers)
        return [answer.text for answer in second.answers("plan", answers) if answer]


def test_questions_about_one_image_are_in_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "WINDOW_BATCHES", 2)
    model = FakeModel(sharers=3)
    assert answered(tmp_path, model) == [f"question {n}" for n in range(len(IMAGES))]
    assert model.windows == ["AAABBB", "CCC"] * 2
    assert model.sharing == {True}
    assert model.asked == [*[(PREPARERS[0], Decoding(4))] * 2, *[(PREPARERS[1], Decoding(5))] * 2]


@pytest.mark.parametrize("sharers", [1, 2])
def test_that_nothing_is_shared_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], sharers: int) -> None:
    answered(tmp_path, FakeModel(sharers))
    assert capsys.readouterr().err.count("d: questions about the same images share nothing") == (sharers == 1)


def test_plans_that_prune_share_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (options, said) in enumerate((({"plan": PlanFile(pruning=FastV(2, 0.5))}, 1), ({"sharing": False}, 0))):
        model = FakeModel(sharers=1)
        answered(tmp_path / str(number), model, **options)
        assert model.sharing == {False}
        assert capsys.readouterr().err.count("share nothing: the plan prunes visual tokens") == said
