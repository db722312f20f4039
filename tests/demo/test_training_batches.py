"""Lessons: what each token is to predict, sees and looks at; and patches as Hugging Face's processor makes them."""

import numpy as np
import pytest

from rlens_jax.data.pages import INKS, Page, Question, make_page, make_question, transcription
from rlens_jax.demo.demo_model import TOKENS
from rlens_jax.demo.training_batches import (
    BUCKET,
    IGNORE,
    VALUES,
    cell_corners,
    cell_labels,
    make_batch,
    make_lesson,
    make_patches,
)

IDS = {token: number for number, token in enumerate(TOKENS)}


@pytest.fixture
def page() -> Page:
    return make_page(np.random.default_rng(4), "train", augment=True)


def test_patches_are_those_of_the_image_processor(page: Page, tmp_path) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from rlens_jax.demo.demo_model import write_processor

    write_processor(tmp_path / "model")
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "model")
    expected = processor(images=[Image.fromarray(page.pixels)], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(make_patches(page.pixels), expected, atol=1e-6)


def test_a_lesson(page: Page) -> None:
    questions = [
        Question("pages_read", "digit at row 2 column 3 ?", "7", (((1, 2),),)),
        Question("pages_read", "read 3 digits of row 1 from column 1 ?", "4 0 9", tuple(((0, c),) for c in range(3))),
    ]
    lesson = make_lesson(page, questions, IDS, 1000)
    words = [TOKENS[i] for i in lesson.token_ids]
    for number, question in enumerate(questions, 1):
        own = np.flatnonzero(lesson.segments == number)
        answer = [*question.answer.split(), "<|im_end|>"]
        predicts = own[-len(answer) :]
        assert [TOKENS[lesson.targets[i]] for i in predicts] == answer
        assert (lesson.targets[own[: -len(answer)]] == IGNORE).all()
        assert " ".join(words[own[0] : own[0] + len(question.text.split())]) == question.text
        corners = cell_corners(page)
        for place, cells in zip(predicts, question.places, strict=False):
            np.testing.assert_array_equal(np.flatnonzero(lesson.relevant[place]), [corners[c] for c in cells])
            held = {VALUES.index(str(page.digits[cells[0]])), VALUES.index(INKS[page.inks[cells[0]]])}
            assert set(np.flatnonzero(lesson.contents[place])) == held
        assert not lesson.relevant[predicts[-1]].any()
        assert not lesson.contents[own[: -len(answer)]].any()
        assert not lesson.contents[predicts[-1]].any()
        assert (lesson.values[own] != IGNORE).sum() == 0
        # Asked as if it were the only question: right after the page.
        first_rope = lesson.rope[lesson.segments == 0].max() + 1
        np.testing.assert_array_equal(lesson.rope[own], first_rope + np.arange(len(own))[:, None].repeat(3, 1))


def test_a_lesson_tells_shares_and_values(page: Page) -> None:
    row = tuple((1, column) for column in range(page.digits.shape[1]))
    question = Question("pages_yesno", "is there a 7 in row 2 ?", "yes", (row,), "7")
    lesson = make_lesson(page, [question], IDS, 1000)
    (due,) = np.flatnonzero(lesson.values != IGNORE)
    assert VALUES[lesson.values[due]] == "7"
    assert TOKENS[lesson.targets[due]] == "yes"
    counts = [(page.digits[1] == digit).mean() for digit in range(10)]
    counts += [(page.inks[1] == ink).mean() for ink in range(len(INKS))]
    np.testing.assert_allclose(lesson.contents[due], counts, rtol=1e-6)


def test_too_long_questions_are_left_out(page: Page) -> None:
    rng = np.random.default_rng(0)
    questions = [transcription(page), *[make_question(rng, page, "pages_read") for _ in range(9)]]
    lesson = make_lesson(page, questions, IDS, 90)
    assert (~lesson.is_visual).sum() <= 90
    assert lesson.segments.max() >= 2


def test_cell_labels_stand_at_the_corners(page: Page) -> None:
    labels, corners = cell_labels(page), cell_corners(page)
    rows, columns = page.digits.shape
    for row in range(rows):
        for column in range(columns):
            digit, ink = page.digits[row, column], page.inks[row, column]
            assert labels[corners[row, column]].tolist() == [digit, ink, row, column]
    assert (labels[:, 0] != IGNORE).sum() == rows * columns


def test_a_batch_fills_empty_slots_with_ignore() -> None:
    batch = make_batch(np.random.default_rng(1), 3, IDS, 0.5)
    assert batch.text_ids.shape == (3, BUCKET.text)
    for row in range(3):
        assert (batch.targets[row, batch.layout.num_text[row] :] == IGNORE).all()
    again = make_batch(np.random.default_rng(1), 3, IDS, 0.5)
    np.testing.assert_array_equal(batch.patches, again.patches)
    np.testing.assert_array_equal(batch.targets, again.targets)
