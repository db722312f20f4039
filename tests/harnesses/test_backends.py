"""Questions of a harness, and the two back ends that answer them."""

from pathlib import Path

import pytest

from rlens_jax.data.page_samples import read_pages
from rlens_jax.errors import UserError
from rlens_jax.harnesses.backends import JaxBackend, Question, open_backend
from rlens_jax.plan_file import PlanFile
from rlens_jax.plans import Plan, Reduction
from rlens_jax.pruning import VTW

A, B = Path("a.png"), b"content"


@pytest.mark.parametrize(
    ("parts", "text", "marked"),
    [
        ((A, B, "which <image>", " is it?"), "which <image> is it?", False),
        (("no image?",), "no image?", False),
        (("is", A, "like", B), "is<image>like<image>", True),
    ],
)
def test_where_images_stand(parts: tuple, text: str, marked: bool) -> None:
    question = Question(parts)
    assert question.prompt() == (text, marked)
    assert question.images == [part for part in parts if part in (A, B)]


def test_marks_in_texts_between_images_are_refused() -> None:
    with pytest.raises(UserError, match="<image> in a text cannot be told from the places of the images around it"):
        Question(("an <image> tag", A)).prompt()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "plan", "complaint"),
    [
        ("torhc", PlanFile(), r"unknown back end 'torhc' \(did you mean 'torch'\?\); there are jax and torch"),
        ("jax", PlanFile(Plan(attention=(12,))), "layer 12"),
        ("torch", PlanFile(pruning=VTW(6)), "the back end torch cannot prune tokens .*; the back end jax can"),
    ],
)
def test_what_cannot_be_opened(name: str, plan: PlanFile, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        open_backend(name, "embedded", plan)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_both_answer_alike() -> None:
    """Under a plan that changes an answer, in the order of the questions; without a repetition penalty, and with one."""
    samples = read_pages("test", 12)["pages_read"]
    questions, penalised = ([Question((each.images[0], each.question), 4, factor) for each in samples] for factor in (1.0, 20.0))
    plan = PlanFile(Plan(attention=(0, 1, 2, 3), ffn=(0, 1, 2)), Reduction(attention_range=4, active_fraction=0.1))
    jax_backend, torch_backend = (open_backend(name, "embedded", plan) for name in ("jax", "torch"))
    ours = jax_backend.answer(questions)
    assert ours == torch_backend.answer(questions)
    assert ours != open_backend("torch", "embedded", PlanFile()).answer(questions)
    assert len(set(ours)) > 2
    less_repeated = jax_backend.answer(penalised)
    assert less_repeated == torch_backend.answer(penalised) and less_repeated != ours


def test_questions_of_different_lengths_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def generate(self, images, prompts, plan, *, max_new_tokens, repetition_penalty, marks):
            said = f"{max_new_tokens} {repetition_penalty} {marks}"
            return [f"{text} {len(mine)} {said}" for text, mine in zip(prompts, images, strict=True)]

    backend = JaxBackend.__new__(JaxBackend)
    backend._model, backend._plan = Model(), PlanFile()
    lengths, penalties = [4 + n % 2 for n in range(140)], [(None, 1.0)[n // 70] for n in range(140)]
    questions = [Question((A, f"{n}", *([B] if n % 3 == 0 else [])), lengths[n], penalties[n]) for n in range(140)]
    said = [f"{length} {penalty}" for length, penalty in zip(lengths, penalties, strict=True)]
    expected = [f"{n}<image> 2 {said[n]} True" if n % 3 == 0 else f"{n} 1 {said[n]} False" for n in range(140)]
    assert backend.answer(questions) == [f"<image>{text}" if "True" in text else text for text in expected]
